"""A model's weights: saved, exported, loaded."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from fastapi import APIRouter
from sqlalchemy import Connection, Row

from ...ckpt import age, paths
from ...engine import messages
from ..checkpoints import expiry, named
from ..errors import ApiError, BadRequest, StorageQuotaExceeded
from ..ledger import checkpoints as rows
from ..ledger import tenancy
from ..runs import Run, model_id
from ..samplers import add as add_sampler
from ..samplers import new_directory, sampler_id
from ..wire import requests
from . import Backend, BackendOf, Owner, future
from .training import optimizer_of, refuse, submit

router = APIRouter(prefix="/api/v1", tags=["weights"])


def new_checkpoint(
    backend: Backend,
    owner: str,
    run: Run,
    uri: paths.CheckpointUri,
    directory: str,
    body: requests.SaveWeights,
):
    """Reserves the name in the transaction of the submit; a name that is taken fails the operation.

    Raises StorageQuotaExceeded there, until the tenant deletes checkpoints.
    """
    expires_at = expiry(body.ttl_seconds)
    limit = backend.quotas.of(owner).checkpoint_bytes

    def also(connection: Connection, request_id: str) -> messages.Failed | None:
        if not body.overwrite and rows.is_taken(connection, uri):
            return messages.Failed(
                request_id, f"checkpoint {str(uri)!r} exists; choose another name or set overwrite", "user"
            )
        if (used := rows.stored_bytes(connection, owner)) >= limit:
            raise StorageQuotaExceeded(
                f"the checkpoints of this key's tenant take {used} bytes, its quota is {limit}; delete some, "
                "or give them a ttl"
            )
        rows.add(
            connection,
            uri,
            owner=owner,
            operation_id=request_id,
            directory=directory,
            base_model=run.base_model,
            lora=run.lora,
            optimizer=run.optimizer,
            user_metadata=body.user_metadata,
            expires_at=expires_at,
        )
        return None

    return also


@router.post("/save_weights")
async def save_weights(body: requests.SaveWeights, backend: BackendOf, owner: Owner) -> dict[str, str]:
    try:
        run = await backend.runs.find_trainable(owner, body.model_id)
        uri = named(
            run.id, "weights", body.path if body.path is not None else f"checkpoint-{int(time.time())}"
        )
        directory = paths.new_directory(uri.run, uri.segment, uri.name)
        operation = await submit(
            backend,
            owner,
            "save_weights",
            run.id,
            body.seq_id,
            messages.SaveState(request_id="", model_id=run.id, directory=directory),
            {"type": "save_weights", "path": str(uri)},
            new_checkpoint(backend, owner, run, uri, directory, body),
        )
    except ApiError as error:
        await refuse(backend, owner, body.model_id, body.seq_id, error)
        raise
    return future(operation)


@router.post("/save_weights_for_sampler")
async def save_weights_for_sampler(
    body: requests.SaveWeightsForSampler, backend: BackendOf, owner: Owner
) -> dict[str, str]:
    """Named: a sampler checkpoint. Unnamed: a sampling session of the weights as they are now, or, inflight,
    of the newest weights that the model has published so."""
    try:
        run = await backend.runs.find_trainable(owner, body.model_id)
        if body.path is not None:
            uri = named(run.id, "sampler_weights", body.path)
            directory = paths.new_directory(uri.run, uri.segment, uri.name)
            reply = {"type": "save_weights_for_sampler", "path": str(uri)}
            # What a name sampled once it samples always: there is no overwriting.
            once = body.model_copy(update={"overwrite": False})
            also = new_checkpoint(backend, owner, run, uri, directory, once)
        elif body.sampling_session_seq_id is not None:
            identifier = sampler_id(run.session_id, body.sampling_session_seq_id)
            directory = new_directory(run.id)
            follows = run.id if body.kind == "inflight" else None
            reply = {"type": "save_weights_for_sampler", "sampling_session_id": identifier}

            def also(connection: Connection, request_id: str) -> messages.Failed | None:
                if tenancy.find_sampler(connection, identifier) is not None:
                    number = body.sampling_session_seq_id
                    return messages.Failed(
                        request_id, f"sampling_session_seq_id {number} of this session is in use", "user"
                    )
                add_sampler(
                    connection,
                    owner,
                    run.session_id,
                    identifier,
                    run.base_model,
                    None,
                    directory,
                    follows,
                )
                return None

        else:
            raise BadRequest(
                "path: missing; give a name, or a sampling_session_seq_id for an unnamed sampler"
            )
        operation = await submit(
            backend,
            owner,
            "save_weights_for_sampler" if body.path is not None else "save_unnamed_sampler",
            run.id,
            body.seq_id,
            messages.SaveSampler("", run.id, directory, deferred=body.path is None),
            reply,
            also,
        )
    except ApiError as error:
        await refuse(backend, owner, body.model_id, body.seq_id, error)
        raise
    return future(operation)


@router.post("/save_weights_external")
async def save_weights_external(
    body: requests.SaveWeightsExternal, backend: BackendOf, owner: Owner
) -> dict[str, str]:
    """Files to download, as PEFT reads them, or transformers those of full weights; each of them encrypted
    where there are recipients."""
    try:
        recipients = body.age_encryption_recipients
        if recipients is not None:
            try:
                age.check_recipients(recipients)
            except ValueError as error:
                raise BadRequest(f"age_encryption_recipients: {error}") from None
        run = await backend.runs.find_trainable(owner, body.model_id)
        uri = named(run.id, "external_weights", body.path)
        directory = paths.new_directory(uri.run, uri.segment, uri.name)
        operation = await submit(
            backend,
            owner,
            "save_weights_external",
            run.id,
            body.seq_id,
            messages.SaveSampler("", run.id, directory, recipients=recipients or []),
            {"type": "save_weights_external", "path": str(uri)},
            new_checkpoint(backend, owner, run, uri, directory, body),
        )
    except ApiError as error:
        await refuse(backend, owner, body.model_id, body.seq_id, error)
        raise
    return future(operation)


@router.post("/load_weights")
async def load_weights(body: requests.LoadWeights, backend: BackendOf, owner: Owner) -> dict[str, str]:
    """Into a model that exists, or, with a session, as a new model."""
    if body.model_id is not None:
        try:
            return await _load_into(body, body.model_id, backend, owner)
        except ApiError as error:
            await refuse(backend, owner, body.model_id, body.seq_id, error)
            raise
    if body.session_id is None or body.model_seq_id is None:
        raise BadRequest(
            "load_weights: give model_id and seq_id, or session_id and model_seq_id for a new model"
        )
    return await _load_as_new(body, body.session_id, body.model_seq_id, backend, owner)


async def _load_into(
    body: requests.LoadWeights, identifier: str, backend: Backend, owner: str
) -> dict[str, str]:
    run = await backend.runs.find_trainable(owner, identifier)
    checkpoint = await backend.checkpoints.find_loadable(owner, body.path)
    if (checkpoint.base_model, _shape(checkpoint.lora)) != (run.base_model, _shape(run.lora)):
        raise BadRequest(
            f"path: {body.path!r} holds {_words(checkpoint)}, the model is {_words(run)}; they must be alike"
        )
    if body.optimizer and checkpoint.optimizer["type"] != run.optimizer["type"]:
        raise BadRequest(
            f"optimizer: {body.path!r} was trained with {checkpoint.optimizer['type']}, the model with "
            f"{run.optimizer['type']}; load it without its optimizer"
        )
    operation = await submit(
        backend,
        owner,
        "load_weights",
        run.id,
        body.seq_id,
        messages.LoadState("", run.id, checkpoint.directory, body.optimizer),
        {"type": "load_weights", "path": body.path, "model_id": run.id},
    )
    return future(operation)


async def _load_as_new(
    body: requests.LoadWeights, session_id: str, model_seq_id: int, backend: Backend, owner: str
) -> dict[str, str]:
    await backend.sessions.require_active(owner, session_id)
    checkpoint = await backend.checkpoints.find_loadable(owner, body.path)
    if body.base_model is not None and body.base_model != checkpoint.base_model:
        raise BadRequest(f"base_model: {body.path!r} was trained from {checkpoint.base_model!r}")
    backend.base_model(checkpoint.base_model)
    identifier = model_id(session_id, model_seq_id)
    optimizer = checkpoint.optimizer if body.optimizer else optimizer_of(body.optimizer_config)
    message = messages.CreateModel(
        request_id="",
        model_id=identifier,
        base_model=checkpoint.base_model,
        lora=None if checkpoint.lora is None else msgspec.convert(checkpoint.lora, messages.LoraSpec),
        optimizer=optimizer["type"],
        checkpoint=checkpoint.directory,
        optimizer_state=body.optimizer,
    )
    with backend.admission.model(owner, identifier, backend.runs.alive(owner)):
        operation = await backend.runs.create(
            owner,
            session_id,
            model_seq_id,
            message,
            optimizer,
            body.user_metadata or {},
            {"type": "load_weights", "path": body.path, "model_id": identifier},
        )
    return future(operation)


def _shape(lora: dict[str, Any] | None) -> dict[str, Any] | None:
    """What two adapters have to agree in."""
    return (
        None if lora is None else {key: value for key, value in lora.items() if key not in ("seed", "alpha")}
    )


def _words(of: Run | Row) -> str:
    return f"{of.base_model} " + ("full weights" if of.lora is None else f"LoRA rank {of.lora['rank']}")
