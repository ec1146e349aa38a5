"""Models: created, described, removed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import orjson
from fastapi import APIRouter
from fastapi.responses import Response

from ....engine import messages
from ...base_models import BaseModels
from ...checkpoints.checkpoints import iso
from ...errors import BadRequest, NotFound
from ...models.run import RLVE, ModelSpec, Run
from ...models.runs import Runs
from ...models.sessions import Named, NamedModels, described
from ...models.submits import Saves
from ...operations.operation import Operation, Submission
from ...operations.operations import Operations
from ...plugins.rlve.runs import RlveRuns
from ...settings import Settings
from ...text.tokenizer import of_folder
from ...wire import models as wire
from ...wire import responses
from ...wire.body import OfModel
from ..bodies import BodyRoute
from ..dependencies import BaseUrl, Owner, Said, described_as, future
from ..model_creations import ModelCreations
from ..provided import Provided

router = APIRouter(prefix="/api/v1", tags=["models"], route_class=BodyRoute)


@router.post("/create_model", responses=described_as(responses.CreateModelFuture))
async def create_model(
    body: wire.CreateModel, base: BaseUrl, creations: Provided[ModelCreations], owner: Owner, said: Said
) -> dict[str, Any]:
    """The model is ready when a poll of the request says so."""
    operation, warnings = await creations.create(owner, body, base, said)
    return future(operation) | {"message": "model creation started"} | warnings


@router.post("/delete_model", responses=described_as(responses.DeletedModel))
async def delete_model(body: OfModel, runs: Provided[Runs], owner: Owner) -> dict[str, Any]:
    """Its operations that are queued are done first; its checkpoints stay."""
    run = await runs.find_live(owner, body.model_id)
    await runs.finish(run)
    return {
        "model_id": run.name,
        "status": "deleted",
        "message": f"model {run.name} is deleted; its checkpoints stay",
        "resources_freed": ["weights", "gradients", "optimizer"],
    }


@router.post("/unload_model", responses=described_as(responses.Future))
async def unload_model(
    body: OfModel, operations: Provided[Operations], runs: Provided[Runs], owner: Owner, said: Said
) -> dict[str, Any]:
    """As delete_model, answered by a poll."""
    run = await runs.find_live(owner, body.model_id)
    await runs.finish(run)
    operation = await operations.accept(
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
async def kill_session(
    body: wire.KillSession,
    runs: Provided[Runs],
    named_models: Provided[NamedModels],
    saves: Provided[Saves],
    owner: Owner,
) -> dict[str, Any]:
    """Unloads the model, behind the operations that are queued; with `save_checkpoint` its training state is
    kept as `session_<model>_final`, with `reset_weights` it begins again as it was created."""
    run = await runs.find_trainable(owner, body.model_id)
    if body.reset_weights and run.alias is None:
        raise BadRequest("reset_weights: this model's id is its session's; create another one instead")
    path = None
    if body.save_checkpoint:
        name = f"session_{run.name.replace(':', '_')}_final"[:128]
        saving = await saves.state(run, name, overwrite=True)
        await saving.finished.wait()
        if not isinstance(saving.answer, messages.Done):
            raise BadRequest(f"the model could not be saved, and stays: {_why(saving)}")
        path = saving.reply["path"]
    await runs.finish(run)
    if body.reset_weights:
        await _begin_again(run, named_models)
    return {
        "success": True,
        "message": f"model {run.name} is unloaded" + (", and begins again" if body.reset_weights else ""),
        "checkpoint_path": path,
    }


def _why(operation: Operation) -> str:
    return operation.answer.message if isinstance(operation.answer, messages.Failed) else "the server stops"


async def _begin_again(run: Run, named_models: NamedModels) -> None:
    """A new model of the same name, created as the old one was."""
    spec = ModelSpec(run.create_message, run.optimizer, run.configuration, [])
    reply = described(spec, "")
    await named_models.open(Named(run.owner, run.name, spec, run.dialect, reply, run.user_metadata))


@router.post("/get_info", responses=described_as(responses.ModelInfo))
async def get_info(
    body: OfModel,
    settings: Provided[Settings],
    base_models: Provided[BaseModels],
    runs: Provided[Runs],
    rlve: Provided[RlveRuns],
    owner: Owner,
) -> dict[str, Any]:
    run = await runs.find_live(owner, body.model_id)
    model = base_models.get(run.base_model)
    model_data: dict[str, Any] = {
        "arch": "transformer",
        "model_name": run.base_model,
        "model_id": run.name,
        "lora_rank": run.lora["rank"] if run.lora else 0,
        "created_at": iso(run.created_at),
    }
    if model is not None and model.hub_id is None and settings.is_loopback:
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
        info["rlve"] = await rlve.described(run)
    return info


@router.get("/get_tokenizer", response_model=None, responses=described_as(responses.TokenizerFile))
async def get_tokenizer(
    model_id: str, base_models: Provided[BaseModels], runs: Provided[Runs], owner: Owner
) -> Response:
    """The tokenizer as a `tokenizer.json`, and beside its keys what else transformers makes of the model's
    tokenizer files."""
    run = await runs.find_live(owner, model_id)
    model = base_models.named(run.base_model)
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
