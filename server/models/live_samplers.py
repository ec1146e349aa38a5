"""Samplers of models as they are now: unnamed weights, saved again when the model has changed since."""

from __future__ import annotations

import asyncio
import uuid
from collections import defaultdict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import Connection

from ...engine import messages
from ..errors import BadRequest, Unavailable
from .run import Run
from .samplers import Sampler, add, new_directory, sampler_id
from .submits import submit

if TYPE_CHECKING:
    from ..backend import Backend

KEPT = 4
"""Of a model's versions: what was asked of an older one is answered by now."""


@dataclass(frozen=True)
class Live:
    """The sampler, and the operation of the model that saved it."""

    sampler: Sampler
    seq_id: int


class LiveSamplers:
    def __init__(self) -> None:
        self._versions: defaultdict[str, deque[Live]] = defaultdict(deque)  # by model
        self._saving: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def of(self, backend: Backend, run: Run) -> Sampler:
        """Wait for the model's operations that are queued. Raises as `save_unnamed`."""
        async with self._saving[run.id]:
            versions = self._versions[run.id]
            if versions and backend.runs.last_seq(run) == versions[-1].seq_id:
                return versions[-1].sampler
            identifier = sampler_id(run.session_id, f"live-{uuid.uuid4().hex[:12]}")
            versions.append(await save_unnamed(backend, run, identifier))
            while len(versions) > KEPT:
                await backend.samplers.forget(versions.popleft().sampler)
            return versions[-1].sampler

    def forget(self, model_id: str) -> None:
        """Its samplers end with the model's session."""
        self._versions.pop(model_id, None)
        self._saving.pop(model_id, None)


async def save_unnamed(backend: Backend, run: Run, identifier: str, key: str | None = None) -> Live:
    """The model's weights behind the operations that are queued, under a new sampler's id; two of the same
    `key` are one.

    Raises BadRequest, NotFound for one that was forgotten since, QuotaExceeded, or Unavailable at a stop.
    """
    directory = new_directory(run.id)
    limit = backend.quotas.of(run.owner).metadata_bytes

    def also(connection: Connection, _request_id: str) -> None:
        add(connection, limit, run.owner, run.session_id, identifier, run.base_model, None, directory)

    is_awaited = backend.distribution.is_awaited(run.base_model, run.owner)
    saving = await submit(
        backend,
        run,
        "save_unnamed_sampler",
        None,
        messages.SaveSampler("", run.id, directory, deferred=True, urgent=is_awaited),
        {"type": "save_weights_for_sampler", "sampling_session_id": identifier},
        also,
        key=key,
    )
    save = await backend.operations.message(saving)
    backend.distribution.follow(saving, save, run.base_model)
    await saving.finished.wait()
    if isinstance(saving.answer, messages.Failed):
        raise BadRequest(f"the model's weights cannot be sampled: {saving.answer.message}")
    if saving.answer is None and not saving.expired:
        raise Unavailable("the server stops")
    return Live(await backend.samplers.find(run.owner, identifier), saving.seq_id)
