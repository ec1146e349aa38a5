"""A model's weights, to sample from and to download."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request
from sqlalchemy import Connection

from ....ckpt import age, paths
from ....engine import messages
from ...checkpoints.checkpoints import named
from ...errors import ApiError, BadRequest
from ...ledger import tenancy
from ...models.run import Run
from ...models.samplers import add as add_sampler
from ...models.samplers import new_directory, number_of, sampler_id
from ...models.saves import new_checkpoint, saved
from ...models.submits import refuse, submit
from ...wire import requests, responses
from ..bodies import BodyRoute
from ..dependencies import Backend, BackendOf, Owner, base_url, described_as, future

router = APIRouter(prefix="/api/v1", tags=["weights"], route_class=BodyRoute)


@router.post("/save_weights_for_sampler", responses=described_as(responses.Future))
async def save_weights_for_sampler(
    body: requests.SaveWeightsForSampler, request: Request, backend: BackendOf, owner: Owner
) -> dict[str, Any]:
    """Named: a sampler checkpoint. Unnamed: a sampling session of the weights as they are now, or, inflight,
    of the newest weights that the model has published so."""
    try:
        run = await backend.runs.find_trainable(owner, body.model_id)
        if run.configuration.get("train_only"):
            raise BadRequest("debug_train_only: this model was created to be trained only; it has no sampler")
        name = body.short_name
        if name is not None:
            kind, (directory, reply, also) = "save_weights_for_sampler", _named(body, name, run, backend)
        else:
            kind, (directory, reply, also) = "save_unnamed_sampler", _unnamed(body, run, backend)
        is_awaited = name is None and backend.distribution.is_awaited(run.base_model, owner)
        operation = await submit(
            backend,
            run,
            kind,
            body.seq_id,
            messages.SaveSampler("", run.id, directory, deferred=name is None, urgent=is_awaited),
            reply | {"router_address": base_url(request, backend)},
            also,
        )
        save = await backend.operations.message(operation)
        backend.distribution.follow(operation, save, run.base_model)
    except ApiError as error:
        await refuse(backend, owner, body.model_id, body.seq_id, error)
        raise
    return future(operation)


_Save = tuple[str, dict[str, Any], Callable[[Connection, str], messages.Failed | None]]


def _named(body: requests.SaveWeightsForSampler, name: str, run: Run, backend: Backend) -> _Save:
    uri = named(run.id, "sampler_weights", name)
    directory = paths.new_directory(uri.run, uri.segment, uri.name)
    # What a name sampled once it samples always: there is no overwriting.
    checkpoint = new_checkpoint(backend, run, uri, directory, **body.kept() | {"overwrite": False})
    reply = saved("save_weights_for_sampler", run, uri)
    reply["model_path"] = reply["path"]
    if run.dialect == "tinker":  # whose clients make sampling sessions of paths
        return directory, reply, checkpoint
    identifier = sampler_id(run.session_id, number_of(run.id, name))
    limit = backend.quotas.of(run.owner).metadata_bytes

    def also(connection: Connection, request_id: str) -> messages.Failed | None:
        failed = checkpoint(connection, request_id)
        if failed is None and tenancy.find_sampler(connection, identifier) is None:
            add_sampler(
                connection, limit, run.owner, run.session_id, identifier, run.base_model, str(uri), directory
            )
        return failed

    return directory, reply | {"sampling_session_id": identifier}, also


def _unnamed(body: requests.SaveWeightsForSampler, run: Run, backend: Backend) -> _Save:
    number = body.sampling_session_seq_id
    identifier = sampler_id(run.session_id, uuid.uuid4().hex[:12] if number is None else number)
    directory = new_directory(run.id)
    follows = run.id if body.kind == "inflight" else None
    limit = backend.quotas.of(run.owner).metadata_bytes

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
    body: requests.SaveWeightsExternal, backend: BackendOf, owner: Owner
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
        run = await backend.runs.find_trainable(owner, body.model_id)
        uri = named(run.id, "external_weights", body.path)
        directory = paths.new_directory(uri.run, uri.segment, uri.name)
        operation = await submit(
            backend,
            run,
            "save_weights_external",
            body.seq_id,
            messages.SaveSampler(
                "", run.id, directory, recipients=recipients or [], merged=body.merged, tokenizer=True
            ),
            saved("save_weights_external", run, uri),
            new_checkpoint(backend, run, uri, directory, **body.kept()),
        )
    except ApiError as error:
        await refuse(backend, owner, body.model_id, body.seq_id, error)
        raise
    return future(operation)
