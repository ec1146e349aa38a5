"""A model's weights, to sample from and to download."""

from __future__ import annotations

import uuid
from typing import Any

from fastapi import APIRouter
from sqlalchemy import Connection

from ....ckpt import age, paths
from ....engine import messages
from ...access.quotas import Quotas
from ...checkpoints.checkpoints import named
from ...errors import ApiError, BadRequest
from ...ledger import tenancy
from ...models.run import Run
from ...models.runs import Runs
from ...models.samplers import add as add_sampler
from ...models.samplers import new_directory, number_of, sampler_id
from ...models.saves import Reservation, Saves, saved
from ...models.submits import Submits
from ...wire import requests, responses
from ..bodies import BodyRoute
from ..dependencies import BaseUrl, Owner, described_as, future
from ..provided import Provided

router = APIRouter(prefix="/api/v1", tags=["weights"], route_class=BodyRoute)


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
    reply = saved("save_weights_for_sampler", run, uri)
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
                "", run.id, directory, recipients=recipients or [], merged=body.merged, tokenizer=True
            ),
            saved("save_weights_external", run, uri),
            saves.checkpoint(run, uri, directory, **body.kept()),
        )
    except ApiError as error:
        await submits.refuse(owner, body.model_id, body.seq_id, error)
        raise
    return future(operation)
