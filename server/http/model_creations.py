"""Models that clients create: from the body to the operation."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from ...engine import messages
from ..base_models import BaseModels
from ..checkpoints.checkpoints import Checkpoints
from ..dialect import Dialect
from ..errors import BadRequest, NotFound
from ..ledger.tenancy import model_id
from ..models.admission import Admission
from ..models.named_models import Named, NamedModels, check_name, described, warnings_of
from ..models.run import RLVE, WANDB, ModelSpec, NewRun
from ..models.runs import Runs
from ..models.sessions import Sessions
from ..operations.operation import Operation
from ..plugins.rlve.runs import RlveRuns
from ..plugins.wandb import WandbRuns
from ..settings import Settings
from ..wire import models as wire
from ..wire.body import DEFAULT_MODEL
from .model_spec import model_spec


class ModelCreations:
    """Creates the models that bodies of `create_model` ask for."""

    def __init__(
        self,
        settings: Settings,
        base_models: BaseModels,
        runs: Runs,
        sessions: Sessions,
        named_models: NamedModels,
        checkpoints: Checkpoints,
        admission: Admission,
        wandb: WandbRuns,
        rlve: RlveRuns,
    ):
        self._settings = settings
        self._base_models = base_models
        self._runs = runs
        self._sessions = sessions
        self._named_models = named_models
        self._checkpoints = checkpoints
        self._admission = admission
        self._wandb = wandb
        self._rlve = rlve

    async def create(
        self, owner: str, body: wire.CreateModel, base_url: str, said: Dialect | None
    ) -> tuple[Operation, dict[str, str]]:
        """Return the creation, and the warnings for its answer. Raises ApiError."""
        dialect: Dialect = said or ("xorl" if body.model_id is not None else "tinkercloud")
        base_model = self._base_models.named(body.base)
        is_tied = await asyncio.to_thread(lambda: base_model.is_tied)
        spec = model_spec(body, "", dialect, self._settings, base_model.max_sequence_length, is_tied)
        if WANDB in spec.configuration:
            self._wandb.check()
        if body.checkpoint_path is not None:
            spec = await self._from_checkpoint(spec, body, owner)
        if (rlve := spec.configuration.get(RLVE)) is not None:
            rlve["difficulties"] = await self._rlve.difficulties(rlve["config"], body.base)
        reply = described(spec, base_url)
        if body.session_id is not None and body.model_seq_id is not None:
            session_id = await self._sessions.of_client(owner, body.session_id, dialect)
            operation = await self._create(spec, body, session_id, dialect, reply, owner)
        else:
            name = body.model_id or (DEFAULT_MODEL if dialect == "xorl" else None)
            if name is not None:
                check_name(name)
            operation = await self._named_models.open(
                Named(
                    owner,
                    name,
                    spec,
                    dialect,
                    reply,
                    body.user_metadata or {},
                    any_alpha=body.lora_config is None or body.lora_config.alpha is None,
                )
            )
        if WANDB in spec.configuration and body.wandb_config and body.wandb_config.api_key:
            self._wandb.remember(operation.model_id, body.wandb_config.api_key.get_secret_value())
        return operation, warnings_of(spec)

    async def _create(
        self,
        spec: ModelSpec,
        body: wire.CreateModel,
        session_id: str,
        dialect: Dialect,
        reply: dict[str, Any],
        owner: str,
    ) -> Operation:
        identifier = model_id(session_id, body.model_seq_id or 0)
        await self._require_unused(owner, identifier, body.model_seq_id)
        with self._admission.model(owner, identifier, self._runs.alive(owner)):
            return await self._runs.create(
                NewRun(
                    owner,
                    session_id,
                    f"create/{session_id}/{body.model_seq_id}",
                    msgspec.structs.replace(spec.message, model_id=identifier),
                    spec.optimizer,
                    body.user_metadata or {},
                    reply | {"model_id": identifier},
                    dialect,
                    configuration=spec.configuration,
                )
            )

    async def _require_unused(self, owner: str, identifier: str, number: int | None) -> None:
        """Raises BadRequest for the number of a deleted model: the request does not repeat its creation."""
        try:
            run = await self._runs.find(owner, identifier)
        except NotFound:
            return
        if run.state == "finished":
            raise BadRequest(
                f"model_seq_id: {number} of this session is a deleted model's, or a copied checkpoint's; "
                "use the next one, or another session_id"
            )

    async def _from_checkpoint(self, spec: ModelSpec, body: wire.CreateModel, owner: str) -> ModelSpec:
        """Its weights, and its optimizer's state."""
        checkpoint = await self._checkpoints.find_loadable(owner, body.checkpoint_path or "")
        lora = None if checkpoint.lora is None else msgspec.convert(checkpoint.lora, messages.LoraSpec)
        if checkpoint.base_model != spec.message.base_model:
            raise BadRequest(f"checkpoint_path: it was trained from {checkpoint.base_model!r}")
        if body.lora_config is not None and (lora.rank if lora else 0) != body.lora_config.rank:
            raise BadRequest(
                f"checkpoint_path: it has LoRA rank {lora.rank if lora else 0}, lora_config asks for "
                f"{body.lora_config.rank}; leave lora_config out"
            )
        if checkpoint.optimizer["type"] != spec.optimizer["type"]:
            raise BadRequest(f"checkpoint_path: it was trained with {checkpoint.optimizer['type']}")
        message = msgspec.structs.replace(spec.message, lora=lora, checkpoint=checkpoint.directory)
        return ModelSpec(message, spec.optimizer, spec.configuration, spec.warnings)
