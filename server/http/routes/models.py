"""Models: created, described, removed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import orjson
from fastapi import APIRouter, Request
from fastapi.responses import Response

from ....engine import messages
from ...checkpoints.checkpoints import iso
from ...dialect import Dialect
from ...errors import BadRequest, NotFound
from ...models.named_models import Named, check_name, described, warnings_of
from ...models.run import RLVE, WANDB, ModelSpec, NewRun, Run
from ...models.runs import model_id
from ...models.saves import save_state
from ...operations.operation import Operation, Submission
from ...text.tokenizer import of_folder
from ...wire import models as wire
from ...wire import responses
from ...wire.body import DEFAULT_MODEL, OfModel
from ..bodies import BodyRoute
from ..dependencies import Backend, BackendOf, Owner, Said, base_url, described_as, future, session_of_client
from ..model_spec import model_spec

router = APIRouter(prefix="/api/v1", tags=["models"], route_class=BodyRoute)


@router.post("/create_model", responses=described_as(responses.CreateModelFuture))
async def create_model(
    body: wire.CreateModel, request: Request, backend: BackendOf, owner: Owner, said: Said
) -> dict[str, Any]:
    """The model is ready when a poll of the request says so."""
    dialect: Dialect = said or ("xorl" if body.model_id is not None else "tinkercloud")
    base_model = backend.base_model(body.base)
    is_tied = await asyncio.to_thread(lambda: base_model.is_tied)
    spec = model_spec(body, "", dialect, backend.settings, base_model.max_sequence_length, is_tied)
    if WANDB in spec.configuration:
        backend.wandb.check()
    if body.checkpoint_path is not None:
        spec = await _from_checkpoint(spec, body, backend, owner)
    if (rlve := spec.configuration.get(RLVE)) is not None:
        rlve["difficulties"] = await backend.rlve.difficulties(rlve["config"], body.base)
    reply = described(spec, base_url(request, backend))
    if body.session_id is not None and body.model_seq_id is not None:
        session_id = await session_of_client(backend, owner, body.session_id, dialect)
        operation = await _create(spec, body, session_id, dialect, reply, backend, owner)
    else:
        name = body.model_id or (DEFAULT_MODEL if dialect == "xorl" else None)
        if name is not None:
            check_name(name)
        operation = await backend.named_models.open(
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
        backend.wandb.remember(operation.model_id, body.wandb_config.api_key.get_secret_value())
    return future(operation) | {"message": "model creation started"} | warnings_of(spec)


async def _create(
    spec: ModelSpec,
    body: wire.CreateModel,
    session_id: str,
    dialect: Dialect,
    reply: dict[str, Any],
    backend: Backend,
    owner: str,
) -> Operation:
    identifier = model_id(session_id, body.model_seq_id or 0)
    await _require_unused(backend, owner, identifier, body.model_seq_id)
    with backend.admission.model(owner, identifier, backend.runs.alive(owner)):
        return await backend.runs.create(
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


async def _require_unused(backend: Backend, owner: str, identifier: str, number: int | None) -> None:
    """Raises BadRequest for the number of a deleted model: the request does not repeat its creation."""
    try:
        run = await backend.runs.find(owner, identifier)
    except NotFound:
        return
    if run.state == "finished":
        raise BadRequest(
            f"model_seq_id: {number} of this session is a deleted model's, or a copied checkpoint's; use the "
            "next one, or another session_id"
        )


async def _from_checkpoint(
    spec: ModelSpec, body: wire.CreateModel, backend: Backend, owner: str
) -> ModelSpec:
    """Its weights, and its optimizer's state."""
    checkpoint = await backend.checkpoints.find_loadable(owner, body.checkpoint_path or "")
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


@router.post("/delete_model", responses=described_as(responses.DeletedModel))
async def delete_model(body: OfModel, backend: BackendOf, owner: Owner) -> dict[str, Any]:
    """Its operations that are queued are done first; its checkpoints stay."""
    run = await backend.runs.find_live(owner, body.model_id)
    await backend.runs.finish(run)
    return {
        "model_id": run.name,
        "status": "deleted",
        "message": f"model {run.name} is deleted; its checkpoints stay",
        "resources_freed": ["weights", "gradients", "optimizer"],
    }


@router.post("/unload_model", responses=described_as(responses.Future))
async def unload_model(body: OfModel, backend: BackendOf, owner: Owner, said: Said) -> dict[str, Any]:
    """As delete_model, answered by a poll."""
    run = await backend.runs.find_live(owner, body.model_id)
    await backend.runs.finish(run)
    operation = await backend.operations.accept(
        Submission(
            owner,
            "unload_model",
            None,
            None,
            {"type": "unload_model", "model_id": run.name},
            also=lambda _connection, request_id: messages.Done(request_id, messages.Nothing()),
            dialect=said or run.dialect,
        )
    )
    return future(operation)


@router.post("/kill_session", responses=described_as(responses.KilledSession))
async def kill_session(body: wire.KillSession, backend: BackendOf, owner: Owner) -> dict[str, Any]:
    """Unloads the model, behind the operations that are queued; with `save_checkpoint` its training state is
    kept as `session_<model>_final`, with `reset_weights` it begins again as it was created."""
    run = await backend.runs.find_trainable(owner, body.model_id)
    if body.reset_weights and run.alias is None:
        raise BadRequest("reset_weights: this model's id is its session's; create another one instead")
    path = None
    if body.save_checkpoint:
        name = f"session_{run.name.replace(':', '_')}_final"[:128]
        saving = await save_state(backend, run, name, overwrite=True)
        await saving.finished.wait()
        if not isinstance(saving.answer, messages.Done):
            raise BadRequest(f"the model could not be saved, and stays: {_why(saving)}")
        path = saving.reply["path"]
    await backend.runs.finish(run)
    if body.reset_weights:
        await _begin_again(run, backend)
    return {
        "success": True,
        "message": f"model {run.name} is unloaded" + (", and begins again" if body.reset_weights else ""),
        "checkpoint_path": path,
    }


def _why(operation: Operation) -> str:
    return operation.answer.message if isinstance(operation.answer, messages.Failed) else "the server stops"


async def _begin_again(run: Run, backend: Backend) -> None:
    """A new model of the same name, created as the old one was."""
    spec = ModelSpec(run.create_message, run.optimizer, run.configuration, [])
    reply = described(spec, "")
    await backend.named_models.open(Named(run.owner, run.name, spec, run.dialect, reply, run.user_metadata))


@router.post("/get_info", responses=described_as(responses.ModelInfo))
async def get_info(body: OfModel, backend: BackendOf, owner: Owner) -> dict[str, Any]:
    run = await backend.runs.find_live(owner, body.model_id)
    model = backend.base_models.get(run.base_model)
    model_data: dict[str, Any] = {
        "arch": "transformer",
        "model_name": run.base_model,
        "model_id": run.name,
        "lora_rank": run.lora["rank"] if run.lora else 0,
        "created_at": iso(run.created_at),
    }
    if model is not None and model.hub_id is None and backend.settings.is_loopback:
        # The client is on this machine and can read the tokenizer from the folder.
        model_data["tokenizer_id"] = str(model.folder)
    elif model is not None and model.tokenizer_id is not None:
        model_data["tokenizer_id"] = model.tokenizer_id
    info = {
        "type": "get_info",
        "model_id": run.name,
        "model_name": run.base_model,
        "model_data": model_data,
        "is_lora": run.lora is not None,
        "optimizer_config": run.optimizer,
        "status": run.state,
    }
    if run.lora is not None:
        info["lora_rank"] = run.lora["rank"]
        info["lora_alpha"] = run.lora["alpha"]
    if RLVE in run.configuration:
        info["rlve"] = await backend.rlve.described(run)
    return info


@router.get("/get_tokenizer", response_model=None, responses=described_as(responses.TokenizerFile))
async def get_tokenizer(model_id: str, backend: BackendOf, owner: Owner) -> Response:
    """The tokenizer as a `tokenizer.json`, and beside its keys what else transformers makes of the model's
    tokenizer files."""
    run = await backend.runs.find_live(owner, model_id)
    model = backend.base_model(run.base_model)
    checkpoint = model.tokenizer_id or model.name
    beside = {"model_max_length": model.max_sequence_length, "hf_checkpoint": checkpoint}
    content = await asyncio.to_thread(_described, model.folder, beside)
    return Response(content, media_type="application/json")


def _described(folder: Path, beside: dict[str, Any]) -> bytes:
    """Raises NotFound for a model without a tokenizer."""
    try:
        return orjson.dumps(of_folder(folder).description() | beside)
    except BadRequest as error:
        raise NotFound(error.message) from None
