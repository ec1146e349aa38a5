"""Samplers of models as they are now: unnamed weights, saved again when the model has changed since."""

from __future__ import annotations

import asyncio
import uuid
from collections import defaultdict, deque
from dataclasses import dataclass

from sqlalchemy import Connection

from ...engine import messages
from ..access.quotas import Quotas
from ..errors import BadRequest, Unavailable
from .run import Run
from .runs import Runs
from .samplers import Sampler, Samplers, add, new_directory, sampler_id
from .saves import Saves

KEPT = 4
"""Of a model's versions: what was asked of an older one is answered by now."""


@dataclass(frozen=True)
class Live:
    """The sampler, and the operation of the model that saved it."""

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
        """Wait for the model's operations that are queued. Raises as `save`. A save that has begun ends, and
        is kept for the next request, also when the one that waits for it is cancelled."""
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
        """Its samplers end with the model's session."""
        self._versions.pop(model_id, None)
        self._saving.pop(model_id, None)

    async def save(self, run: Run, identifier: str, key: str | None = None) -> Live:
        """The model's weights behind the operations that are queued, under a new sampler's id; two of the
        same `key` are one.

        Raises BadRequest, NotFound for one that was forgotten since, QuotaExceeded, or Unavailable at a stop.
        """
        directory = new_directory(run.id)
        limit = self._quotas.of(run.owner).metadata_bytes

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
