"""A model's training state: saved and loaded."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from fastapi import APIRouter
from sqlalchemy import Connection, Row

from ....engine import messages
from ...base_models import BaseModels
from ...checkpoints.checkpoints import Checkpoints
from ...errors import ApiError, BadRequest
from ...ledger import tenancy
from ...ledger.tenancy import model_id
from ...models.admission import Admission
from ...models.run import NewRun, Run
from ...models.runs import Runs
from ...models.saves import Saves
from ...models.sessions import Sessions
from ...models.submits import Submits
from ...wire import requests, responses
from ..bodies import BodyRoute
from ..dependencies import Owner, Said, described_as, future
from ..model_creations import optimizer_of
from ..provided import Provided

router = APIRouter(prefix="/api/v1", tags=["weights"], route_class=BodyRoute)


@router.post("/save_weights", responses=described_as(responses.Future))
async def save_weights(
    body: requests.SaveWeights,
    runs: Provided[Runs],
    submits: Provided[Submits],
    saves: Provided[Saves],
    owner: Owner,
) -> dict[str, Any]:
    """Without a name it is one of the time."""
    try:
        run = await runs.find_trainable(owner, body.model_id)
        name = f"checkpoint-{int(time.time())}" if body.short_name is None else body.short_name
        operation = await saves.state(run, name, body.seq_id, **body.kept())
    except ApiError as error:
        await submits.refuse(owner, body.model_id, body.seq_id, error)
        raise
    return future(operation)


@router.post("/load_weights", responses=described_as(responses.Future))
async def load_weights(
    body: requests.LoadWeights,
    base_models: Provided[BaseModels],
    admission: Provided[Admission],
    runs: Provided[Runs],
    sessions: Provided[Sessions],
    checkpoints: Provided[Checkpoints],
    submits: Provided[Submits],
    owner: Owner,
    said: Said,
) -> dict[str, Any]:
    """Into a model that exists, or, with a session, as a new model."""
    if body.session_id is not None and body.model_seq_id is not None:
        return await _load_as_new(
            body,
            body.session_id,
            body.model_seq_id,
            base_models,
            admission,
            runs,
            sessions,
            checkpoints,
            owner,
            said,
        )
    identifier = body.model_id or body.session_id
    if identifier is None:
        raise BadRequest(
            "load_weights: give model_id and seq_id, or session_id and model_seq_id for a new model"
        )
    try:
        return await _load_into(body, identifier, runs, checkpoints, submits, owner)
    except ApiError as error:
        await submits.refuse(owner, identifier, body.seq_id, error)
        raise


async def _load_into(
    body: requests.LoadWeights,
    identifier: str,
    runs: Runs,
    checkpoints: Checkpoints,
    submits: Submits,
    owner: str,
) -> dict[str, Any]:
    run = await runs.find_trainable(owner, identifier)
    checkpoint = await checkpoints.find_loadable(owner, body.path, run.name)
    if (checkpoint.base_model, _shape(checkpoint.lora)) != (run.base_model, _shape(run.lora)):
        raise BadRequest(
            f"path: {body.path!r} holds {_words(checkpoint)}, the model is {_words(run)}; they must be alike"
        )
    if body.optimizer and checkpoint.optimizer["type"] != run.optimizer["type"]:
        raise BadRequest(
            f"optimizer: {body.path!r} was trained with {checkpoint.optimizer['type']}, the model with "
            f"{run.optimizer['type']}; load it without its optimizer"
        )
    operation = await submits.submit(
        run,
        "load_weights",
        body.seq_id,
        messages.LoadState("", run.id, checkpoint.directory, body.optimizer),
        {"type": "load_weights", "path": body.path},
        lambda connection, _request_id: _take_scale(run, checkpoint.lora, connection),
    )
    return future(operation)


def _take_scale(run: Run, lora: dict[str, Any] | None, connection: Connection) -> None:
    """The model gets the alpha of the adapter that it loads."""
    if lora is not None and run.lora is not None and lora["alpha"] != run.lora["alpha"]:
        run.lora = run.lora | {"alpha": lora["alpha"]}
        tenancy.update_model(connection, run.id, lora=run.lora)


async def _load_as_new(
    body: requests.LoadWeights,
    session_id: str,
    model_seq_id: int,
    base_models: BaseModels,
    admission: Admission,
    runs: Runs,
    sessions: Sessions,
    checkpoints: Checkpoints,
    owner: str,
    said: Said,
) -> dict[str, Any]:
    session_id = await sessions.require_active(owner, session_id)
    checkpoint = await checkpoints.find_loadable(owner, body.path)
    if body.base_model is not None and body.base_model != checkpoint.base_model:
        raise BadRequest(f"base_model: {body.path!r} was trained from {checkpoint.base_model!r}")
    base_models.named(checkpoint.base_model)
    identifier = model_id(session_id, model_seq_id)
    optimizer = checkpoint.optimizer if body.optimizer else optimizer_of(body.optimizer_config)
    message = messages.CreateModel(
        request_id="",
        model_id=identifier,
        base_model=checkpoint.base_model,
        lora=None if checkpoint.lora is None else msgspec.convert(checkpoint.lora, messages.LoraSpec),
        optimizer=optimizer["type"],
        optimizer_options=optimizer.get("optimizer_kwargs", {}),
        checkpoint=checkpoint.directory,
        optimizer_state=body.optimizer,
    )
    with admission.model(owner, identifier, runs.alive(owner)):
        operation = await runs.create(
            NewRun(
                owner,
                session_id,
                f"create/{session_id}/{model_seq_id}",
                message,
                optimizer,
                body.user_metadata or {},
                {"type": "load_weights", "path": body.path, "model_id": identifier},
                said or "tinker",
            )
        )
    return future(operation)


def _shape(lora: dict[str, Any] | None) -> dict[str, Any] | None:
    """What two adapters have to agree in."""
    return (
        None if lora is None else {key: value for key, value in lora.items() if key not in ("seed", "alpha")}
    )


def _words(of: Run | Row) -> str:
    return f"{of.base_model} " + ("full weights" if of.lora is None else f"LoRA rank {of.lora['rank']}")
