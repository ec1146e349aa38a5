"""Adapters of PEFT become checkpoints."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from ...ckpt import paths
from ...engine import messages
from ..access import Quotas
from ..base_models import BaseModels
from ..checkpoints import named
from ..checkpoints.archive import described, unpack
from ..errors import BadRequest, StorageQuotaExceeded, Unavailable
from ..files import Disk
from ..ledger import checkpoints as rows
from ..ledger.ledger import Ledger
from ..ledger.tenancy import model_id
from ..operations.operation import Operation
from ..settings import Settings
from .run import NewRun
from .runs import Runs
from .saves import Saves, save_answer
from .sessions import Sessions
from .submits import Admission, Submits


@dataclass(frozen=True)
class AdapterImports:
    """Makes checkpoints of adapters that clients upload."""

    settings: Settings
    base_models: BaseModels
    ledger: Ledger
    disk: Disk
    quotas: Quotas
    admission: Admission
    sessions: Sessions
    runs: Runs
    submits: Submits
    saves: Saves

    async def make(
        self, owner: str, base_model: str, name: str, project_id: str | None, uploaded: AsyncIterator[bytes]
    ) -> dict[str, Any]:
        """Make a training run with two checkpoints called `name` of an uploaded tar, and describe them.

        Raises BadRequest for an adapter that does not fit, StorageFull and StorageQuotaExceeded.
        """
        named("imported", "weights", name)
        await self._require_quota(owner)
        # Nameless, so that nothing is left of it whatever happens.
        with tempfile.TemporaryFile(dir=self.settings.data_dir) as tar:
            async for chunk in uploaded:
                self.disk.require_room()
                await asyncio.to_thread(tar.write, chunk)
            tar.seek(0)
            fields = {"tags": ["imported"], "user_metadata": {}, "project_id": project_id}
            session_id = await self.sessions.create(owner, fields)
            run_id = model_id(session_id, 0)
            # Below the checkpoints, where the sweep finds what a crash leaves once no replay can need it.
            key = f"checkpoints/{run_id.replace(':', '@')}/imported/{uuid.uuid4().hex}"
            directory = paths.resolve(self.settings.data_dir, key)
            reason, detail = "errored", "the adapter could not be imported"
            try:
                await asyncio.to_thread(unpack, tar, directory)
                await self._create(owner, session_id, base_model, key, directory)
                answer = await self._save(owner, run_id, name)
                reason, detail = "success", "it holds an imported adapter"
            finally:
                await self.sessions.finish(owner, session_id, reason, detail)
                await asyncio.to_thread(shutil.rmtree, directory.parent, ignore_errors=True)
        return answer

    async def _require_quota(self, owner: str) -> None:
        """Raise StorageQuotaExceeded if the owner's checkpoints have reached its quota."""
        limit = self.quotas[owner].checkpoint_bytes

        def used(connection: Connection) -> int:
            return rows.stored_bytes(connection, owner)

        if (stored := await self.ledger.read(used)) >= limit:
            raise StorageQuotaExceeded(
                f"the checkpoints of this key's tenant take {stored} bytes, its quota is {limit}; delete some"
            )

    async def _create(self, owner: str, session_id: str, base_model: str, key: str, directory: Path) -> None:
        """Create a run with the adapter's weights. Raises BadRequest for an adapter that does not fit."""
        model = self.base_models.named(base_model)
        lora = await asyncio.to_thread(lambda: described(directory, model.adapter_modules))
        limit = self.settings.max_rank
        if lora.rank > limit:
            raise BadRequest(f"the adapter's rank {lora.rank} is over this server's maximum of {limit}")
        if not (lora.train_attn or lora.train_mlp or lora.train_unembed):
            raise BadRequest("the adapter has no matrix of this server's models: nothing would be trained")
        run_id = model_id(session_id, 0)
        message = messages.CreateModel("", run_id, base_model, lora, checkpoint=key, optimizer_state=False)
        with self.admission.model(owner, run_id, self.runs.alive(owner)):
            reply = {"type": "import_weights", "model_id": run_id}
            operation = await self.runs.create(
                NewRun(owner, session_id, f"create/{session_id}/0", message, {"type": "adamw"}, {}, reply)
            )
        await _done(operation)

    async def _save(self, owner: str, run_id: str, name: str) -> dict[str, Any]:
        """Save the run as two checkpoints of this name, and return the answer to the import."""
        run = await self.runs.find_trainable(owner, run_id)
        saved: dict[str, Any] = {
            "type": "import_weights",
            "training_run_id": run_id,
            "base_model": run.base_model,
        }
        steps: list[tuple[str, str, paths.Segment, type[messages.SaveState | messages.SaveSampler]]] = [
            ("path", "save_weights", "weights", messages.SaveState),
            ("sampler_path", "save_weights_for_sampler", "sampler_weights", messages.SaveSampler),
        ]
        for number, (field, kind, segment, message) in enumerate(steps, 1):
            uri = named(run_id, segment, name)
            directory = paths.new_directory(uri.run, uri.segment, uri.name)
            also = self.saves.checkpoint(run, uri, directory)
            await _done(
                await self.submits.submit(
                    run, kind, number, message("", run_id, directory), save_answer(kind, run, uri), also
                )
            )
            saved[field] = str(uri)
        return saved


async def _done(operation: Operation) -> None:
    """Wait for the answer. Raises BadRequest or Unavailable if there is none, or it is an error."""
    await operation.finished.wait()
    if operation.answer is None:
        raise Unavailable("the server stops; import the adapter again")
    if isinstance(operation.answer, messages.Failed):
        if operation.answer.category == "user":
            raise BadRequest(operation.answer.message)
        raise Unavailable(operation.answer.message)
