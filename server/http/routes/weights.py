"""A model's weights: saved, loaded, and imported from PEFT."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query, Request
from sqlalchemy import Connection, Row

from ....ckpt import age, paths
from ....engine import messages
from ...access.keys import Quotas
from ...base_models import BaseModels
from ...checkpoints.checkpoints import Checkpoints, named
from ...errors import ApiError, BadRequest
from ...ledger import tenancy
from ...ledger.tenancy import model_id
from ...models.adapter_imports import AdapterImports
from ...models.admission import Admission
from ...models.run import NewRun, Run
from ...models.runs import Runs
from ...models.samplers import add as add_sampler
from ...models.samplers import new_directory, number_of, sampler_id
from ...models.sessions import Sessions
from ...models.submits import Reservation, Saves, Submits, save_answer
from ...wire import requests, responses
from ..bodies import BodyRoute
from ..dependencies import BaseUrl, Owner, Said, described_as, future
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


@router.post("/save_weights_for_sampler", responses=described_as(responses.Future))
async def save_weights_for_sampler(
    body: requests.SaveWeightsForSampler,
    base: BaseUrl,
    quotas: Provided[Quotas],
    runs: Provided[Runs],
    submits: Provided[Submits],
    saves: Provided[Saves],
    owner: Owner,
) -> dict[str, Any]:
    """Named: a sampler checkpoint. Unnamed: a sampling session of the weights as they are now, or, inflight,
    of the newest weights that the model has published so."""
    try:
        run = await runs.find_trainable(owner, body.model_id)
        if run.configuration.get("train_only"):
            raise BadRequest("debug_train_only: this model was created to be trained only; it has no sampler")
        name = body.short_name
        if name is not None:
            directory, reply, reserve = _named(body, name, run, quotas, saves)
            save = saves.named_sampler
        else:
            directory, reply, reserve = _unnamed(body, run, quotas)
            save = saves.unnamed_sampler
        operation = await save(run, body.seq_id, directory, reply | {"router_address": base}, reserve)
    except ApiError as error:
        await submits.refuse(owner, body.model_id, body.seq_id, error)
        raise
    return future(operation)


_Save = tuple[str, dict[str, Any], Reservation]


def _named(body: requests.SaveWeightsForSampler, name: str, run: Run, quotas: Quotas, saves: Saves) -> _Save:
    uri = named(run.id, "sampler_weights", name)
    directory = paths.new_directory(uri.run, uri.segment, uri.name)
    # What a name sampled once it samples always: there is no overwriting.
    checkpoint = saves.checkpoint(run, uri, directory, **body.kept() | {"overwrite": False})
    reply = save_answer("save_weights_for_sampler", run, uri)
    reply["model_path"] = reply["path"]
    if run.dialect == "tinker":  # whose clients make sampling sessions of paths
        return directory, reply, checkpoint
    identifier = sampler_id(run.session_id, number_of(run.id, name))
    limit = quotas.of(run.owner).metadata_bytes

    def also(connection: Connection, request_id: str) -> messages.Failed | None:
        failed = checkpoint(connection, request_id)
        if failed is None and tenancy.find_sampler(connection, identifier) is None:
            add_sampler(
                connection, limit, run.owner, run.session_id, identifier, run.base_model, str(uri), directory
            )
        return failed

    return directory, reply | {"sampling_session_id": identifier}, also


def _unnamed(body: requests.SaveWeightsForSampler, run: Run, quotas: Quotas) -> _Save:
    number = body.sampling_session_seq_id
    identifier = sampler_id(run.session_id, uuid.uuid4().hex[:12] if number is None else number)
    directory = new_directory(run.id)
    follows = run.id if body.kind == "inflight" else None
    limit = quotas.of(run.owner).metadata_bytes

    def also(connection: Connection, request_id: str) -> messages.Failed | None:
        if tenancy.find_sampler(connection, identifier) is not None:
            return messages.Failed(
                request_id, f"sampling_session_seq_id {number} of this session is in use", "user"
            )
        add_sampler(
            connection, limit, run.owner, run.session_id, identifier, run.base_model, None, directory, follows
        )
        return None

    reply = {"type": "save_weights_for_sampler", "path": None, "sampling_session_id": identifier}
    return directory, reply, also


@router.post("/save_weights_external", responses=described_as(responses.Future))
async def save_weights_external(
    body: requests.SaveWeightsExternal,
    runs: Provided[Runs],
    submits: Provided[Submits],
    saves: Provided[Saves],
    owner: Owner,
) -> dict[str, Any]:
    """Files to download, as PEFT reads them, or transformers those of full weights and of adapters that are
    `merged`; each of them encrypted where there are recipients."""
    try:
        recipients = body.age_encryption_recipients
        if recipients is not None:
            try:
                age.check_recipients(recipients)
            except ValueError as error:
                raise BadRequest(f"age_encryption_recipients: {error}") from None
        run = await runs.find_trainable(owner, body.model_id)
        uri = named(run.id, "external_weights", body.path)
        directory = paths.new_directory(uri.run, uri.segment, uri.name)
        operation = await submits.submit(
            run,
            "save_weights_external",
            body.seq_id,
            messages.SaveSampler(
                "",
                run.id,
                directory,
                recipients=recipients or [],
                merged=body.merged,
                tokenizer=True,
                experts=body.experts,
            ),
            save_answer("save_weights_external", run, uri),
            saves.checkpoint(run, uri, directory, **body.kept()),
        )
    except ApiError as error:
        await submits.refuse(owner, body.model_id, body.seq_id, error)
        raise
    return future(operation)


IMPORT_PATH = "/api/v1/import_weights"


@router.post("/import_weights", responses=described_as(responses.ImportedWeights))
async def import_weights(
    request: Request,
    base_models: Provided[BaseModels],
    adapter_imports: Provided[AdapterImports],
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
    base_models.named(base_model)
    return await adapter_imports.make(owner, base_model, name, project_id, request.stream())
