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
from ...access import Quotas
from ...base_models import BaseModels
from ...checkpoints import Checkpoints, named
from ...dialect import Dialect
from ...errors import BadRequest
from ...ledger import tenancy
from ...ledger.tenancy import model_id
from ...models.adapter_imports import AdapterImports
from ...models.run import NewRun, Run
from ...models.runs import Runs
from ...models.samplers import add as add_sampler
from ...models.samplers import new_directory, number_of, sampler_id
from ...models.saves import Reservation, Saves, save_answer
from ...models.sessions import Sessions
from ...models.submits import Admission, Submits
from ...wire import requests, responses
from ..bodies import BodyRoute
from ..dependencies import BaseUrl, Owner, Provided, RequestedDialect, described_as, future
from ..model_creations import optimizer_of

router = APIRouter(prefix="/api/v1", tags=["weights"], route_class=BodyRoute)


@router.post("/save_weights", responses=described_as(responses.Future))
async def save_weights(
    body: requests.SaveWeights,
    runs: Provided[Runs],
    submits: Provided[Submits],
    saves: Provided[Saves],
    owner: Owner,
) -> dict[str, Any]:
    """Save a model's training state as a checkpoint. Without a name, it is named after the time."""
    async with submits.numbered(owner, body.model_id, body.seq_id):
        run = await runs.find_trainable(owner, body.model_id)
        name = f"checkpoint-{int(time.time())}" if body.short_name is None else body.short_name
        return future(await saves.state(run, name, body.seq_id, **body.kept()))


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
    requested: RequestedDialect,
) -> dict[str, Any]:
    """Load a checkpoint into a model, or, with `session_id` and `model_seq_id`, as a new model."""
    if body.session_id is not None and body.model_seq_id is not None:
        session_id = await sessions.require_active(owner, body.session_id)
        checkpoint = await checkpoints.find_loadable(owner, body.path)
        if body.base_model is not None and body.base_model != checkpoint.base_model:
            raise BadRequest(f"base_model: {body.path!r} was trained from {checkpoint.base_model!r}")
        base_models.named(checkpoint.base_model)
        new = _new_run(body, checkpoint, owner, session_id, body.model_seq_id, requested or "tinker")
        with admission.model(owner, new.message.model_id, runs.alive(owner)):
            return future(await runs.create(new))
    identifier = body.model_id or body.session_id
    if identifier is None:
        raise BadRequest(
            "load_weights: give model_id and seq_id, or session_id and model_seq_id for a new model"
        )
    async with submits.numbered(owner, identifier, body.seq_id):
        run = await runs.find_trainable(owner, identifier)
        checkpoint = await checkpoints.find_loadable(owner, body.path, run.name)
        _check_alike(body, checkpoint, run)
        message = messages.LoadState("", run.id, checkpoint.directory, body.optimizer)
        reply = {"type": "load_weights", "path": body.path}

        def take_scale(connection: Connection, _request_id: str) -> None:
            """Give the model the alpha of the adapter that it loads."""
            lora = checkpoint.lora
            if lora is not None and run.lora is not None and lora["alpha"] != run.lora["alpha"]:
                run.lora = run.lora | {"alpha": lora["alpha"]}
                tenancy.update_model(connection, run.id, lora=run.lora)

        return future(await submits.submit(run, "load_weights", body.seq_id, message, reply, take_scale))


def _new_run(
    body: requests.LoadWeights, checkpoint: Row, owner: str, session_id: str, number: int, dialect: Dialect
) -> NewRun:
    """Return the model that a checkpoint is loaded as."""
    optimizer = checkpoint.optimizer if body.optimizer else optimizer_of(body.optimizer_config)
    message = messages.CreateModel(
        request_id="",
        model_id=model_id(session_id, number),
        base_model=checkpoint.base_model,
        lora=None if checkpoint.lora is None else msgspec.convert(checkpoint.lora, messages.LoraSpec),
        optimizer=optimizer["type"],
        optimizer_options=optimizer.get("optimizer_kwargs", {}),
        checkpoint=checkpoint.directory,
        optimizer_state=body.optimizer,
    )
    reply = {"type": "load_weights", "path": body.path, "model_id": message.model_id}
    metadata = body.user_metadata or {}
    key = f"create/{session_id}/{number}"
    return NewRun(owner, session_id, key, message, optimizer, metadata, reply, dialect)


def _check_alike(body: requests.LoadWeights, checkpoint: Row, run: Run) -> None:
    """Raise BadRequest for a checkpoint of another kind of model, or of another optimizer."""
    if (checkpoint.base_model, _shape(checkpoint.lora)) != (run.base_model, _shape(run.lora)):
        raise BadRequest(
            f"path: {body.path!r} holds {_words(checkpoint)}, the model is {_words(run)}; they must be alike"
        )
    if body.optimizer and checkpoint.optimizer["type"] != run.optimizer["type"]:
        raise BadRequest(
            f"optimizer: {body.path!r} was trained with {checkpoint.optimizer['type']}, the model with "
            f"{run.optimizer['type']}; load it without its optimizer"
        )


def _shape(lora: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the part of an adapter's description in which two adapters have to agree."""
    return lora and {key: value for key, value in lora.items() if key not in ("seed", "alpha")}


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
    """Save a model's weights to sample from.

    With a name: as a sampler checkpoint. Without one: as a sampling session of the weights as they are now,
    or, inflight, of the newest weights that the model has published in this way.
    """
    async with submits.numbered(owner, body.model_id, body.seq_id):
        run = await runs.find_trainable(owner, body.model_id)
        if run.configuration.get("train_only"):
            raise BadRequest("debug_train_only: this model was created to be trained only; it has no sampler")
        if body.short_name is not None:
            directory, reply, reserve = _named(body, body.short_name, run, quotas, saves)
            save = saves.named_sampler
        else:
            directory, reply, reserve = _unnamed(body, run, quotas)
            save = saves.unnamed_sampler
        return future(await save(run, body.seq_id, directory, reply | {"router_address": base}, reserve))


_Save = tuple[str, dict[str, Any], Reservation]
"""The directory for the weights, the reply, and what to write to the ledger with the operation."""


def _named(body: requests.SaveWeightsForSampler, name: str, run: Run, quotas: Quotas, saves: Saves) -> _Save:
    """Prepare a sampler checkpoint. It is never overwritten: a name always means the same weights."""
    uri = named(run.id, "sampler_weights", name)
    directory = paths.new_directory(uri.run, uri.segment, uri.name)
    checkpoint = saves.checkpoint(run, uri, directory, **body.kept() | {"overwrite": False})
    reply = save_answer("save_weights_for_sampler", run, uri)
    reply["model_path"] = reply["path"]
    if run.dialect == "tinker":  # whose clients make sampling sessions of paths
        return directory, reply, checkpoint
    identifier = sampler_id(run.session_id, number_of(run.id, name))
    limit = quotas[run.owner].metadata_bytes

    def also(connection: Connection, request_id: str) -> messages.Failed | None:
        failed = checkpoint(connection, request_id)
        if failed is None and tenancy.find_sampler(connection, identifier) is None:
            add_sampler(
                connection, limit, run.owner, run.session_id, identifier, run.base_model, str(uri), directory
            )
        return failed

    return directory, reply | {"sampling_session_id": identifier}, also


def _unnamed(body: requests.SaveWeightsForSampler, run: Run, quotas: Quotas) -> _Save:
    """Prepare a sampling session without a checkpoint."""
    number = body.sampling_session_seq_id
    identifier = sampler_id(run.session_id, uuid.uuid4().hex[:12] if number is None else number)
    directory = new_directory(run.id)
    follows = run.id if body.kind == "inflight" else None
    limit = quotas[run.owner].metadata_bytes

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
    """Write weights as files to download, each encrypted if there are recipients.

    An adapter's files are those that PEFT reads. Full weights, and adapters that are `merged` into them, are
    written as transformers reads them.
    """
    async with submits.numbered(owner, body.model_id, body.seq_id):
        recipients = body.age_encryption_recipients or []
        if body.age_encryption_recipients is not None:
            try:
                age.check_recipients(recipients)
            except ValueError as error:
                raise BadRequest(f"age_encryption_recipients: {error}") from None
        run = await runs.find_trainable(owner, body.model_id)
        uri = named(run.id, "external_weights", body.path)
        directory = paths.new_directory(uri.run, uri.segment, uri.name)
        kind = "save_weights_external"
        message = messages.SaveSampler(
            "",
            run.id,
            directory,
            recipients=recipients,
            merged=body.merged,
            tokenizer=True,
            experts=body.experts,
        )
        reserve = saves.checkpoint(run, uri, directory, **body.kept())
        reply = save_answer(kind, run, uri)
        return future(await submits.submit(run, kind, body.seq_id, message, reply, reserve))


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
    """Import a folder that PEFT's `save_pretrained` wrote, sent as an uncompressed tar of up to
    `max_import_bytes`.

    Creates a training run in a session of its own, with a checkpoint to train on (`weights/<name>`) and one
    to sample from (`sampler_weights/<name>`), and answers when both are complete. 400 says why an adapter
    does not fit.
    """
    base_models.named(base_model)
    return await adapter_imports.make(owner, base_model, name, project_id, request.stream())
