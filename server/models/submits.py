"""Submits: operations of models, samples and saves, from a router to the ledger.

A submit is checked, finds its place in the tenant's quota, gets its number in the model's sequence, and is
accepted. When a submit is refused for good, its number is used up, so that the operations after it can run.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol

import msgspec
from sqlalchemy import Connection

from ...ckpt import paths
from ...engine import messages
from ..access import Quotas
from ..checkpoints import expiry, named
from ..dialect import DIALECT_RULES, Dialect
from ..errors import ApiError, BadRequest, StorageQuotaExceeded
from ..ledger import checkpoints as checkpoint_rows
from ..ledger import operations as rows
from ..ledger.ledger import Ledger
from ..ledger.operations import SAMPLE, SampleNumber
from ..operations.answers import REPLAYED
from ..operations.dispatcher import Dispatcher
from ..operations.operation import Operation, Submission, natural_key
from ..operations.operations import Operations
from ..operations.sample_streams import SampleStreams
from .admission import Admission
from .run import Run
from .runs import Runs


class UnusedNumbers:
    """Uses up numbers of operations that will not be run.

    `numbered` tells which operation of which model a client's number means, and raises ApiError for a
    model that is not the client's own.
    """

    def __init__(
        self,
        ledger: Ledger,
        dispatcher: Dispatcher,
        numbered: Callable[[str, str, int], Awaitable[tuple[str, int]]],
    ):
        self._ledger = ledger
        self._dispatcher = dispatcher
        self._numbered = numbered

    async def consume(self, owner: str, model_id: Any, seq_id: Any, message: str) -> None:
        """Use up the number of a submit that was refused, so that the operations after it run."""
        is_number = isinstance(seq_id, int) and not isinstance(seq_id, bool)
        if not isinstance(model_id, str) or not is_number or not 0 < seq_id < 1 << 61:
            return
        try:
            model_id, seq_id = await self._numbered(owner, model_id, seq_id)
        except ApiError:
            return
        await self.give_up(owner, model_id, seq_id, message)

    async def give_up(self, owner: str, model_id: str, seq_id: int, message: str) -> None:
        """Use up a number that has not had its turn: answer its operation with an error."""
        if seq_id < self._dispatcher.next_seq(model_id):
            return
        request_id = f"req_{uuid.uuid4().hex}"
        failure = messages.Failed(request_id, message, "user")
        operation = Operation(
            request_id, owner, "refused", model_id, seq_id, {}, answer=failure, rejected=True
        )

        def change(connection: Connection) -> bool:
            key = natural_key(model_id, seq_id)
            if rows.find_by_natural_key(connection, key) is not None:
                return False
            row: dict[str, Any] = {
                "id": request_id,
                "owner": owner,
                "natural_key": key,
                "kind": operation.kind,
                "reply": {},
            }
            row |= {"model_id": model_id, "seq_id": seq_id}
            rows.add(connection, row | {"state": "rejected", "answer": messages.encode(failure)})
            return True

        if await self._ledger.write(change):
            operation.finished.set()
            self._dispatcher.add(operation)


class RefusedSaves:
    """Uses up the numbers of saves that were refused for want of room, once nobody sends them again.

    A client sends such a save again for some minutes and then gives it up, and the operations after it
    would wait for its number. A save changes no model, so they can run without it.
    """

    def __init__(self, unused: UnusedNumbers, patience_seconds: float):
        self._unused = unused
        self._patience_seconds = patience_seconds
        self._timers: dict[tuple[str, int], asyncio.TimerHandle] = {}
        self._consuming: set[asyncio.Task[None]] = set()

    def refused(self, owner: str, model_id: str, seq_id: int, message: str) -> None:
        """Note that a save was refused, for the first time or again."""
        known = self._timers.pop((model_id, seq_id), None)
        if known is not None:
            known.cancel()
        self._timers[model_id, seq_id] = asyncio.get_running_loop().call_later(
            self._patience_seconds, self._give_up, owner, model_id, seq_id, message
        )

    def _give_up(self, owner: str, model_id: str, seq_id: int, message: str) -> None:
        del self._timers[model_id, seq_id]
        task = asyncio.ensure_future(self._use_up(owner, model_id, seq_id, message))
        self._consuming.add(task)
        task.add_done_callback(self._consuming.discard)

    async def _use_up(self, owner: str, model_id: str, seq_id: int, message: str) -> None:
        try:
            await self._unused.consume(owner, model_id, seq_id, message)
        except ApiError:  # the ledger cannot be written now
            self.refused(owner, model_id, seq_id, message)

    def close(self) -> None:
        for timer in self._timers.values():
            timer.cancel()


_TRAINING = REPLAYED - {"save_unnamed_sampler"}


class Submits:
    """Submits the operations of models, and uses up the numbers of those that are refused."""

    def __init__(
        self,
        runs: Runs,
        operations: Operations,
        admission: Admission,
        unused: UnusedNumbers,
        refused_saves: RefusedSaves,
    ):
        self._runs = runs
        self._operations = operations
        self._admission = admission
        self._unused = unused
        self._refused_saves = refused_saves

    async def submit(
        self,
        run: Run,
        kind: str,
        seq_id: int | None,
        message: messages.ToEngine,
        reply: dict[str, Any] | None = None,
        also: Any = None,
        key: str | None = None,
    ) -> Operation:
        """Submit an operation of a model; without a `seq_id` it comes after all that have arrived.

        `message` has no request id yet. Two operations without a `seq_id` but with the same `key` are
        one. Only the server itself uses a `key`: a model that it trains takes no other training.
        """
        if run.driven and key is None and (seq_id is not None or kind in _TRAINING):
            raise BadRequest(
                f"{kind}: the server trains this model (rlve_config); stop it with stop_rlve first. "
                "Saves that have no seq_id, and samples, are welcome meanwhile"
            )
        number = self._runs.reserve_seq(run) if seq_id is None else run.seq_base + seq_id
        try:
            if not self._runs.is_alive(run):
                self._admission.come_back(run.owner, self._runs.alive(run.owner))
            with self._admission.operation(run.owner, self._runs.is_early(run, number)) as accepted:
                operation = await self._operations.accept(
                    Submission(
                        run.owner,
                        kind,
                        key if seq_id is None else natural_key(run.id, number),
                        lambda request_id: msgspec.structs.replace(message, request_id=request_id),
                        {"model_id": run.name} | (reply or {}),
                        run.id,
                        number,
                        also,
                        run.dialect,
                    )
                )
                accepted(operation)
        except ApiError as error:
            if seq_id is None:  # nobody will send this number again
                await self._unused.give_up(run.owner, run.id, number, error.message)
            raise
        if operation.seq_id != number:
            await self._unused.give_up(run.owner, run.id, number, f"{kind} was sent before")
        return operation

    @asynccontextmanager
    async def numbered(self, owner: str, model: Any, seq_id: Any) -> AsyncIterator[None]:
        """Refuse this number of a model's operations if what happens in this context raises ApiError."""
        try:
            yield
        except ApiError as error:
            await self.refuse(owner, model, seq_id, error)
            raise

    async def refuse(self, owner: str, model: Any, seq_id: Any, error: ApiError) -> None:
        """Use up the number of a submit that is wrong for good. One that lacks room may be sent again."""
        if error.final:
            await self._unused.consume(owner, model, seq_id, error.message)
        elif isinstance(error, StorageQuotaExceeded) and isinstance(seq_id, int):
            self._refused_saves.refused(owner, model, seq_id, error.message)


class SampleCheck(Protocol):
    """Knows which samples can be drawn."""

    def check(self, owner: str, sample: messages.Sample) -> None:
        """Raise BadRequest, naming the field, for a sample that will never be drawn."""


class SampleSubmits:
    """Submits samples: checked, admitted, accepted."""

    def __init__(
        self, operations: Operations, admission: Admission, streams: SampleStreams, checks: SampleCheck
    ):
        self._operations = operations
        self._admission = admission
        self._streams = streams
        self._checks = checks

    def check(self, owner: str, sample: messages.Sample) -> None:
        """Raise BadRequest for a sample that `submit` would refuse because of what it asks for."""
        self._checks.check(owner, sample)

    async def submit(
        self,
        owner: str,
        sample: messages.Sample,
        number: SampleNumber | None = None,
        reply: dict[str, Any] | None = None,
        dialect: Dialect = "tinker",
    ) -> Operation:
        """Accept a sample, which has no request id yet. Raises ApiError."""
        self._checks.check(owner, sample)
        opened: str | None = None

        def message(request_id: str) -> messages.Sample:
            nonlocal opened
            if sample.stream:
                self._streams.open(request_id, owner)
                opened = request_id
            return msgspec.structs.replace(sample, request_id=request_id)

        try:
            with self._admission.sample(owner) as accepted:
                operation = await self._operations.accept(
                    Submission(
                        owner,
                        SAMPLE,
                        number.natural_key if number else None,
                        message,
                        reply or {},
                        dialect=dialect,
                        session_id=number.session_id if number else None,
                        sampler_id=number.sampler_id if number else None,
                        sample_number=number.number if number else None,
                    )
                )
                accepted(operation)
        except ApiError:
            if opened is not None:
                self._streams.close(opened)
            raise
        return operation

    def cancel(self, operation: Operation) -> None:
        """Stop drawing a sample that nobody waits for any more."""
        self._streams.close(operation.request_id)
        if operation.answer is None and not self._operations.stopped:
            self._operations.cancel(operation)


def spelled(run: Run, uri: paths.CheckpointUri) -> str:
    """Spell a checkpoint's path as the model's client does."""
    return f"{DIALECT_RULES[run.dialect].scheme}{run.name}/{uri.checkpoint_id}"


def save_answer(kind: str, run: Run, uri: paths.CheckpointUri) -> dict[str, Any]:
    """Make the answer to a save, without its size."""
    return {
        "type": kind,
        "path": spelled(run, uri),
        "name": uri.name,
        "checkpoint_path": spelled(run, uri),
        "tinker_path": str(uri),
        "xorl_path": f"{paths.XORL_SCHEME}{run.name}/{uri.checkpoint_id}",
    }


Reservation = Callable[[Connection, str], messages.Failed | None]
"""A save's own part of the transaction that accepts it."""


class SavedWeights(Protocol):
    """Uses weights that are saved for samplers."""

    def is_awaited(self, base_model: str, owner: str) -> bool:
        """Return whether weights that the owner saves are wanted as soon as they are there."""

    def follow(self, operation: Operation, save: messages.ToEngine | None, base_model: str) -> None:
        """Note that a save was accepted; `save` is its message, None if it was made before."""


class Saves:
    """Saves the weights of models."""

    def __init__(self, submits: Submits, operations: Operations, quotas: Quotas, saved: SavedWeights):
        self._submits = submits
        self._operations = operations
        self._quotas = quotas
        self._saved = saved

    async def state(self, run: Run, name: str, seq_id: int | None = None, **fields: Any) -> Operation:
        """Save the training state under this name; `fields` are those of `checkpoint`. Raises ApiError."""
        uri = named(run.id, "weights", name)
        directory = paths.new_directory(uri.run, uri.segment, uri.name)
        return await self._submits.submit(
            run,
            "save_weights",
            seq_id,
            messages.SaveState(request_id="", model_id=run.id, directory=directory),
            save_answer("save_weights", run, uri),
            self.checkpoint(run, uri, directory, **fields),
        )

    async def named_sampler(
        self, run: Run, seq_id: int | None, directory: str, reply: dict[str, Any], reserve: Reservation
    ) -> Operation:
        """Save weights to sample from as a checkpoint. Raises ApiError."""
        message = messages.SaveSampler("", run.id, directory)
        return await self._sampler(run, "save_weights_for_sampler", seq_id, message, reply, reserve, None)

    async def unnamed_sampler(
        self,
        run: Run,
        seq_id: int | None,
        directory: str,
        reply: dict[str, Any],
        reserve: Reservation,
        key: str | None = None,
    ) -> Operation:
        """Save weights that only a sampling session names. `key` as in `Submits.submit`. Raises ApiError."""
        urgent = self._saved.is_awaited(run.base_model, run.owner)
        message = messages.SaveSampler("", run.id, directory, deferred=True, urgent=urgent)
        return await self._sampler(run, "save_unnamed_sampler", seq_id, message, reply, reserve, key)

    async def _sampler(
        self,
        run: Run,
        kind: str,
        seq_id: int | None,
        message: messages.SaveSampler,
        reply: dict[str, Any],
        reserve: Reservation,
        key: str | None,
    ) -> Operation:
        operation = await self._submits.submit(run, kind, seq_id, message, reply, reserve, key)
        self._saved.follow(operation, await self._operations.message(operation), run.base_model)
        return operation

    def checkpoint(
        self,
        run: Run,
        uri: paths.CheckpointUri,
        directory: str,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        user_metadata: dict[str, str] | None = None,
    ) -> Reservation:
        """Reserve the name in the transaction of the submit; a name that is taken fails the operation.

        Raises StorageQuotaExceeded there, until the tenant deletes checkpoints.
        """
        expires_at = expiry(ttl_seconds)
        limit = self._quotas.of(run.owner).checkpoint_bytes

        def also(connection: Connection, request_id: str) -> messages.Failed | None:
            # What a name of a model means is one thing, also when the model was unloaded and made again.
            taken = checkpoint_rows.is_taken(connection, uri) or (
                run.alias is not None
                and checkpoint_rows.find_by_alias(connection, run.owner, run.alias, uri) is not None
            )
            if not overwrite and taken:
                message = f"checkpoint {spelled(run, uri)!r} exists; choose another name"
                if uri.segment == "weights":
                    message += " or set overwrite"
                return messages.Failed(request_id, message, "user")
            if (used := checkpoint_rows.stored_bytes(connection, run.owner)) >= limit:
                raise StorageQuotaExceeded(
                    f"the checkpoints of this key's tenant take {used} bytes, its quota is {limit}; "
                    "delete some, or give them a ttl"
                )
            checkpoint_rows.add(
                connection,
                uri,
                owner=run.owner,
                operation_id=request_id,
                directory=directory,
                base_model=run.base_model,
                lora=run.lora,
                optimizer=run.optimizer,
                user_metadata=user_metadata,
                expires_at=expires_at,
            )
            return None

        return also
