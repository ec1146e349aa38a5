"""Adapters of PEFT become checkpoints."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from sqlalchemy import Connection

from ....ckpt import paths
from ....engine import messages
from ...checkpoints.adapter_archive import described, unpack
from ...checkpoints.checkpoints import named
from ...errors import BadRequest, StorageQuotaExceeded, Unavailable
from ...ledger import checkpoints as rows
from ...models.run import NewRun
from ...models.runs import model_id
from ...models.saves import new_checkpoint
from ...models.saves import saved as saved_reply
from ...models.submits import submit
from ...operations.operation import Operation
from ...wire import responses
from ..dependencies import Backend, BackendOf, Owner, described_as

PATH = "/api/v1/import_weights"
router = APIRouter(tags=["weights"])


@router.post(PATH, responses=described_as(responses.ImportedWeights))
async def import_weights(
    request: Request,
    backend: BackendOf,
    owner: Owner,
    base_model: str,
    name: str = "imported",
    project_id: Annotated[str | None, Query(min_length=1, max_length=256)] = None,
) -> dict[str, Any]:
    """A folder that PEFT's `save_pretrained` wrote, as an uncompressed tar of up to `max_import_bytes`.

    Makes a training run of a session of its own, with a checkpoint to train on (`weights/<name>`) and one to
    sample from (`sampler_weights/<name>`), and answers when both are complete. 400 says why an adapter does
    not fit.
    """
    backend.base_model(base_model)
    named("imported", "weights", name)
    await _require_quota(backend, owner)
    # Nameless, so that nothing is left of it whatever happens.
    with tempfile.TemporaryFile(dir=backend.settings.data_dir) as tar:
        async for chunk in request.stream():
            backend.disk.require_room()
            await asyncio.to_thread(tar.write, chunk)
        tar.seek(0)
        fields = {"tags": ["imported"], "user_metadata": {}, "project_id": project_id}
        session_id = await backend.sessions.create(owner, fields)
        run_id = model_id(session_id, 0)
        # Below the checkpoints, where the sweep finds what a crash leaves once no replay can need it.
        key = f"checkpoints/{run_id.replace(':', '@')}/imported/{uuid.uuid4().hex}"
        directory = paths.resolve(backend.settings.data_dir, key)
        reason, detail = "errored", "the adapter could not be imported"
        try:
            await asyncio.to_thread(unpack, tar, directory)
            await _create(backend, owner, session_id, base_model, key, directory)
            answer = await _save(backend, owner, run_id, name)
            reason, detail = "success", "it holds an imported adapter"
        finally:
            await backend.sessions.finish(owner, session_id, reason, detail)
            await asyncio.to_thread(shutil.rmtree, directory.parent, ignore_errors=True)
    return answer


async def _require_quota(backend: Backend, owner: str) -> None:
    limit = backend.quotas.of(owner).checkpoint_bytes

    def used(connection: Connection) -> int:
        return rows.stored_bytes(connection, owner)

    if (stored := await backend.ledger.read(used)) >= limit:
        raise StorageQuotaExceeded(
            f"the checkpoints of this key's tenant take {stored} bytes, its quota is {limit}; delete some"
        )


async def _create(
    backend: Backend, owner: str, session_id: str, base_model: str, key: str, directory: Path
) -> None:
    """A run with the adapter's weights. Raises BadRequest for what does not fit."""
    lora = await asyncio.to_thread(described, directory)
    limit = backend.settings.max_rank
    if lora.rank > limit:
        raise BadRequest(f"the adapter's rank {lora.rank} is over this server's maximum of {limit}")
    if not (lora.train_attn or lora.train_mlp or lora.train_unembed):
        raise BadRequest("the adapter has no matrix of this server's models: nothing would be trained")
    run_id = model_id(session_id, 0)
    message = messages.CreateModel("", run_id, base_model, lora, checkpoint=key, optimizer_state=False)
    with backend.admission.model(owner, run_id, backend.runs.alive(owner)):
        reply = {"type": "import_weights", "model_id": run_id}
        operation = await backend.runs.create(
            NewRun(owner, session_id, f"create/{session_id}/0", message, {"type": "adamw"}, {}, reply)
        )
    await _done(operation)


async def _save(backend: Backend, owner: str, run_id: str, name: str) -> dict[str, Any]:
    run = await backend.runs.find_trainable(owner, run_id)
    saved: dict[str, Any] = {
        "type": "import_weights",
        "training_run_id": run_id,
        "base_model": run.base_model,
    }
    saves: list[tuple[str, str, paths.Segment, type[messages.SaveState | messages.SaveSampler]]] = [
        ("path", "save_weights", "weights", messages.SaveState),
        ("sampler_path", "save_weights_for_sampler", "sampler_weights", messages.SaveSampler),
    ]
    for number, (field, kind, segment, message) in enumerate(saves, 1):
        uri = named(run_id, segment, name)
        directory = paths.new_directory(uri.run, uri.segment, uri.name)
        also = new_checkpoint(backend, run, uri, directory)
        await _done(
            await submit(
                backend, run, kind, number, message("", run_id, directory), saved_reply(kind, run, uri), also
            )
        )
        saved[field] = str(uri)
    return saved


async def _done(operation: Operation) -> None:
    """Waits for the answer. Raises BadRequest, or Unavailable."""
    await operation.finished.wait()
    if operation.answer is None:
        raise Unavailable("the server stops; import the adapter again")
    if isinstance(operation.answer, messages.Failed):
        if operation.answer.category == "user":
            raise BadRequest(operation.answer.message)
        raise Unavailable(operation.answer.message)
