"""Sampling sessions: weights under an id that clients sample from.

Weights that only a sampling session names are unnamed. They are in the engine's memory before they are on
disk; what was not written when the engine died is made again by a replay of their model's operations.

`LiveSamplers` has samplers of models as they are now: unnamed weights, saved again when the model changed.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
import uuid
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from sqlalchemy import Connection, Row
from sqlalchemy.exc import SQLAlchemyError

from ...ckpt import paths
from ...engine import messages
from ..access import Quotas
from ..base_models import BaseModels
from ..errors import ApiError, BadRequest, NotFound, Unavailable
from ..events import Tasks
from ..ledger import tenancy
from ..ledger.ledger import Ledger
from ..operations.operation import Operation
from ..operations.operations import Operations
from ..settings import Settings
from ..supervision.supervisor import Supervisor
from .run import Run
from .runs import Runs
from .saves import Saves

log = logging.getLogger("tinsmith.samplers")

_ROOT = "samplers"  # of the directories of unnamed weights
_SIGN_OF_LIFE_EVERY = 60.0  # seconds; a session that samples is alive, whether it sends heartbeats or not
_SWEEP_EVERY = 600.0
_REMEMBERED = 65_536  # others are read from the ledger again
# Directories that no sampler names may be of a save under way, or of samples that wait for their turn.
_SPARED_SECONDS = 3600.0


K = TypeVar("K")
V = TypeVar("V")
D = TypeVar("D")


class Recent(Generic[K, V]):
    """A dictionary of at most `limit` entries; the least recently used one gives way."""

    def __init__(self, limit: int):
        self._limit = limit
        self._entries: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: K, default: D) -> V | D:
        if key not in self._entries:
            return default
        self._entries.move_to_end(key)
        return self._entries[key]

    def __setitem__(self, key: K, value: V) -> None:
        self._entries[key] = value
        self._entries.move_to_end(key)
        if len(self._entries) > self._limit:
            self._entries.popitem(last=False)

    def discard(self, key: K) -> None:
        self._entries.pop(key, None)


@dataclass(frozen=True)
class Sampler:
    """A sampling session.

    `follows` is the model whose newest inflight weights it samples; None: its weights never change.
    """

    id: str
    owner: str
    session_id: str
    base_model: str
    model_path: str | None
    directory: str | None
    follows: str | None
    engine: messages.SamplingEngine | None = None
    base_digest: str | None = None  # None: not known

    @property
    def ref(self) -> messages.SamplerRef:
        return messages.SamplerRef(self.base_model, self.directory, self.engine)


def sampler_id(session_id: str, sampling_session_seq_id: int | str) -> str:
    return f"{session_id}:sample:{sampling_session_seq_id}"


def number_of(run_id: str, name: str) -> str:
    """Number the sampler of a checkpoint of one of the session's models, in place of a client's number."""
    return f"{run_id.rpartition(':')[2]}-{name}"


def new_directory(run_id: str) -> str:
    """Make a key for unnamed weights of a model."""
    return f"{_ROOT}/{run_id.replace(':', '@')}/{uuid.uuid4().hex}"


def run_of(directory: str | None) -> str | None:
    """Return the model that unnamed weights are of; None for other weights."""
    root, _, rest = (directory or "").partition("/")
    return rest.partition("/")[0].replace("@", ":") if root == _ROOT else None


def _sampler(row: Row) -> Sampler:
    return Sampler(
        row.id,
        row.owner,
        row.session_id,
        row.base_model,
        row.model_path,
        row.directory,
        row.follows,
        row.sampling_engine,
        row.base_digest,
    )


@dataclass(eq=False)
class Samplers:
    """Creates, finds and forgets samplers, and recreates lost weights.

    `on_removed` is called with each directory that is removed.
    """

    ledger: Ledger
    engine: Supervisor
    operations: Operations
    runs: Runs
    settings: Settings
    quotas: Quotas
    base_models: BaseModels
    on_removed: Callable[[str], None]

    def __post_init__(self) -> None:
        self._samplers: Recent[str, Sampler] = Recent(_REMEMBERED)
        self._alive: Recent[str, float] = Recent(_REMEMBERED)  # by session: when the ledger noted it last
        self._making = Tasks()
        self.operations.weights_missing.subscribe(self._missing)

    async def create(
        self,
        owner: str,
        session_id: str,
        seq_id: int | str,
        base_model: str,
        model_path: str | None,
        directory: str | None,
        engine: messages.SamplingEngine | None = None,
    ) -> Sampler:
        """Create a sampler. Asking again for the same number and weights finds the first one.

        Raises BadRequest for a number that has other weights.
        """
        identifier = sampler_id(session_id, seq_id)
        limit = self.quotas[owner].metadata_bytes

        def change(connection: Connection) -> Row:
            if tenancy.find_sampler(connection, identifier) is None:
                add(
                    connection,
                    limit,
                    owner,
                    session_id,
                    identifier,
                    base_model,
                    model_path,
                    directory,
                    engine=engine,
                )
            row = tenancy.find_sampler(connection, identifier)
            assert row is not None
            return row

        sampler = _sampler(await self.ledger.write(change))
        if (sampler.base_model, sampler.model_path) != (base_model, model_path):
            raise BadRequest(
                f"sampling_session_seq_id {seq_id} of this session has other weights; use the next number"
            )
        if engine not in (None, sampler.engine):
            raise BadRequest(
                f"sampling_engine: sampling_session_seq_id {seq_id} of this session has another; use the next"
                " number"
            )
        self._samplers[identifier] = sampler
        return sampler

    async def find(self, owner: str, identifier: str) -> Sampler:
        """Find a sampler by its id.

        Raises NotFound for what does not exist or is not the owner's, BadRequest for a sampler whose
        base model has other weights now.
        """
        sampler = self._samplers.get(identifier, None)
        if sampler is None:
            row = await self.ledger.read(tenancy.find_sampler, identifier)
            if row is not None:
                sampler = _sampler(row)
                if sampler.follows is None:  # the others' directories move
                    self._samplers[identifier] = sampler
        if sampler is None or sampler.owner != owner:
            raise NotFound(f"unknown sampling session {identifier!r}: create one first")
        if (why := self.base_models.changed(sampler)) is not None:
            raise BadRequest(f"sampling session {identifier!r}: {why}, or create another session")
        return sampler

    async def sampled(self, sampler: Sampler) -> None:
        """Note a sign of life of the sampler's session."""
        now = time.time()
        if now - self._alive.get(sampler.session_id, 0.0) >= _SIGN_OF_LIFE_EVERY:
            self._alive[sampler.session_id] = now
            await self.ledger.write(tenancy.heartbeat, sampler.session_id, now)

    # --- weights that are not there

    def _missing(self, operation: Operation, message: str) -> None:
        """Recreate weights that were not on disk when the engine died."""
        self._making.begin(self._make_again(operation, message))

    async def _make_again(self, operation: Operation, message: str) -> None:
        life = self.engine.life
        try:
            sample = await self.operations.message(operation)
        except (ApiError, SQLAlchemyError, OSError) as error:
            log.error("a sample's weights are not made again: %s", error)
            sample = None
        run_id = run_of(sample.sampler.weights) if isinstance(sample, messages.Sample) else None
        if run_id is None or operation.weights_made_in == life:
            self.operations.fail([operation], message)
            return
        operation.weights_made_in = life
        log.info("unnamed sampler weights of %s are not on disk: the model makes them again", run_id)
        try:
            is_back = await self.runs.bring_back(operation.owner, run_id)
        except NotFound:
            is_back = False
        if is_back:
            operation.sent_in = 0
            self.operations.send_to_engine(operation, behind=run_id)
        elif self.engine.alive and self.engine.life == operation.weights_made_in:
            self.operations.fail([operation], message)

    # --- weights that nobody needs

    async def forget(self, sampler: Sampler) -> None:
        """Forget a sampler of unnamed weights."""
        of = tenancy.is_sampler(sampler.id)
        await self._forget(await self.ledger.write(tenancy.delete_unnamed_samplers, of=of))

    async def forget_unnamed(self, session_id: str) -> None:
        """Forget the samplers of unnamed weights of a session that is over."""
        of = tenancy.of_session(session_id)
        await self._forget(await self.ledger.write(tenancy.delete_unnamed_samplers, of=of))

    async def _forget(self, gone: Sequence[Row]) -> None:
        for row in gone:
            self._samplers.discard(row.id)
            release = messages.ReleaseSampler(f"release-{uuid.uuid4().hex}", row.directory)
            self.engine.outbox.put_own(messages.encode(release))
            self.on_removed(row.directory)
            directory = paths.resolve(self.settings.data_dir, row.directory)
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)

    async def sweep(self) -> None:
        """Remove the unnamed weights of long silent sessions, and directories that no sampler names."""
        silent_since = time.time() - self.settings.unnamed_sampler_seconds
        of = tenancy.of_sessions_silent_since(silent_since)
        gone = await self.ledger.write(tenancy.delete_unnamed_samplers, of=of)
        if gone:
            log.info("%d unnamed samplers of silent sessions are removed", len(gone))
        await self._forget(gone)
        named = await self.ledger.read(tenancy.sampler_directories)
        await asyncio.to_thread(self._remove_all_but, named)

    def _remove_all_but(self, named: set[str]) -> None:
        spared_since = time.time() - _SPARED_SECONDS
        root = self.settings.data_dir / _ROOT
        for directory in root.glob("*/*"):
            if str(directory.relative_to(self.settings.data_dir)) in named:
                continue
            if directory.stat().st_mtime < spared_since:
                shutil.rmtree(directory, ignore_errors=True)

    async def sweep_forever(self) -> None:
        while True:
            try:
                await self.sweep()
            except (ApiError, OSError) as error:
                log.error("unnamed samplers could not be swept: %s", error)
            await asyncio.sleep(_SWEEP_EVERY)


def add(
    connection: Connection,
    metadata_bytes: int,
    owner: str,
    session_id: str,
    identifier: str,
    base_model: str,
    model_path: str | None,
    directory: str | None,
    follows: str | None = None,
    engine: messages.SamplingEngine | None = None,
) -> None:
    """Add a sampler's row. Raises QuotaExceeded.

    `metadata_bytes` is the owner's quota. With `engine` None the session says who draws its samples, or
    else the server.
    """
    tenancy.require_room(connection, owner, metadata_bytes)
    tenancy.add_sampler(
        connection,
        id=identifier,
        owner=owner,
        session_id=session_id,
        base_model=base_model,
        model_path=model_path,
        directory=directory,
        follows=follows,
        sampling_engine=engine or tenancy.sampling_engine_of_session(connection, session_id),
    )


KEPT = 4
"""The number of a model's versions that stay: samples of older ones have been answered by then."""


@dataclass(frozen=True)
class Live:
    """Weights of a model as it is now: the sampler, and the number of the operation that saved it."""

    sampler: Sampler
    seq_id: int


class LiveSamplers:
    """Saves the newest weights of models to be sampled, and lets older ones go."""

    def __init__(self, runs: Runs, samplers: Samplers, saves: Saves, quotas: Quotas):
        self._runs = runs
        self._samplers = samplers
        self._saves = saves
        self._quotas = quotas
        self._versions: defaultdict[str, deque[Live]] = defaultdict(deque)  # by model
        self._saving: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        runs.finished.subscribe(self._forget)

    async def of(self, run: Run) -> Sampler:
        """Return a sampler of the model as it is after all operations that are queued. Raises as `save`.

        A save that has begun ends, and serves the next request, also when the one that waits for it
        is cancelled.
        """
        newest = asyncio.ensure_future(self._newest(run))
        newest.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(newest)

    async def _newest(self, run: Run) -> Sampler:
        async with self._saving[run.id]:
            versions = self._versions[run.id]
            if versions and self._runs.last_seq(run) == versions[-1].seq_id:
                return versions[-1].sampler
            identifier = sampler_id(run.session_id, f"live-{uuid.uuid4().hex[:12]}")
            versions.append(await self.save(run, identifier))
            while len(versions) > KEPT:
                await self._samplers.forget(versions.popleft().sampler)
            return versions[-1].sampler

    def _forget(self, model_id: str) -> None:
        """Forget the samplers of a model whose session is over, and which end with it."""
        self._versions.pop(model_id, None)
        self._saving.pop(model_id, None)

    async def save(self, run: Run, identifier: str, key: str | None = None) -> Live:
        """Save the model's weights behind the operations that are queued, under a new sampler's id.

        Two saves of the same `key` are one. Raises BadRequest, NotFound for a sampler that was
        forgotten since, QuotaExceeded, or Unavailable at a stop.
        """
        directory = new_directory(run.id)
        limit = self._quotas[run.owner].metadata_bytes

        def reserve(connection: Connection, _request_id: str) -> None:
            add(connection, limit, run.owner, run.session_id, identifier, run.base_model, None, directory)

        reply = {"type": "save_weights_for_sampler", "sampling_session_id": identifier}
        saving = await self._saves.unnamed_sampler(run, None, directory, reply, reserve, key)
        await saving.finished.wait()
        if isinstance(saving.answer, messages.Failed):
            raise BadRequest(f"the model's weights cannot be sampled: {saving.answer.message}")
        if saving.answer is None and not saving.expired:
            raise Unavailable("the server stops")
        return Live(await self._samplers.find(run.owner, identifier), saving.seq_id)
