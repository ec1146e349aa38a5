"""Sessions, and the models in them: created, kept alive, described, finished, listed."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import orjson
from fastapi import APIRouter
from fastapi.responses import Response

from ....engine import messages
from ...access import Quotas, user_urn
from ...base_models import BaseModels
from ...checkpoints import as_strings, iso
from ...errors import BadRequest, NotFound
from ...ledger import checkpoints as checkpoint_rows
from ...ledger import tenancy
from ...ledger.ledger import Ledger
from ...models.run import RLVE, ModelSpec
from ...models.runs import Runs
from ...models.saves import Saves
from ...models.sessions import Named, NamedModels, Sessions, described, shown_id
from ...operations.operation import Submission
from ...operations.operations import Operations
from ...plugins.rlve.runs import RlveRuns
from ...settings import Settings
from ...text import of_folder
from ...wire import OfModel, requests, responses
from ..bodies import BodyRoute
from ..dependencies import BaseUrl, Limit, Offset, Owner, Provided, RequestedDialect, described_as, future
from ..model_creations import TIED, ModelCreations

router = APIRouter(prefix="/api/v1", tags=["sessions"], route_class=BodyRoute)

AccessScope = Literal["owned", "accessible"]
"""Both mean the same for sessions: nobody publishes one."""
_LEAST_ACTIVE_SECONDS = 180.0  # heartbeats are written down once a minute
_MODEL_FIELDS = frozenset({"session_id", "base_model", "lora_config"})


@router.post("/create_session", responses=described_as(responses.CreatedSession))
async def create_session(
    body: requests.CreateSession,
    base: BaseUrl,
    base_models: Provided[BaseModels],
    sessions: Provided[Sessions],
    creations: Provided[ModelCreations],
    owner: Owner,
    requested: RequestedDialect,
) -> dict[str, Any]:
    """Open a session. In xorl's dialect, or with a model's fields, a model of the same name is created in it.
    A client of tinkercloud may choose the session's id alone."""
    given = body.model_fields_set & _MODEL_FIELDS
    has_model = requested == "xorl" or bool(given - {"session_id"} if requested == "tinkercloud" else given)
    dialect = requested or ("xorl" if has_model else "tinkercloud")
    fields = body.model_dump(exclude=set(_MODEL_FIELDS)) | {"dialect": dialect}
    fields["user_metadata"] = fields["user_metadata"] or {}
    info = warning = None
    if has_model and requested != "tinker":
        session_id, base_model, warnings = await creations.create_with_session(
            owner, body, fields, base, dialect
        )
        info, warning = f"model {session_id!r} is trained from {base_model}", "; ".join(warnings) or None
    elif body.session_id is not None and requested != "tinker":
        session_id = body.session_id
        await sessions.open_named(owner, session_id, fields | {"display_name": session_id})
    else:
        session_id = await sessions.create(owner, fields)
    if requested == "tinker":  # the SDK shows this to its user, and nothing that create_model answers
        info = await asyncio.to_thread(_tied_warning, base_models)
    return {
        "type": "create_session",
        "session_id": session_id,
        "info_message": info,
        "warning_message": warning,
        "error_message": None,
    }


def _tied_warning(base_models: BaseModels) -> str | None:
    """Return what users of the SDK should know before they create a model whose embeddings are tied."""
    tied = [model.name for model in base_models.values() if model.is_tied]
    return f"{', '.join(tied)}: {TIED}" if tied else None


@router.post("/session_heartbeat", responses=described_as(responses.SessionAlive))
async def session_heartbeat(
    body: requests.SessionHeartbeat, runs: Provided[Runs], sessions: Provided[Sessions], owner: Owner
) -> dict[str, str]:
    """Keep a session open. It is named by its id, or by what its client calls the model in it."""
    try:
        await sessions.heartbeat(owner, body.session_id)
    except NotFound:
        try:
            run = await runs.find_live(owner, body.session_id)
        except NotFound:
            message = f"unknown session {body.session_id!r}: create one with create_session"
            raise NotFound(message) from None
        await sessions.heartbeat(owner, run.session_id)
    return {"type": "session_heartbeat", "session_id": body.session_id}


@router.get("/session_info", responses=described_as(responses.SessionSummary))
async def session_info(
    settings: Provided[Settings],
    quotas: Provided[Quotas],
    ledger: Provided[Ledger],
    runs: Provided[Runs],
    owner: Owner,
) -> dict[str, Any]:
    """Summarize the caller's models that are not finished."""
    rows = await ledger.read(tenancy.active_models, owner)
    resident = {run.id for run in runs.resident()}
    names = {row.id: row.alias or row.id for row in rows}
    return {
        "registered_models": list(dict.fromkeys(names.values())),
        "active_sessions": len({row.session_id for row in rows}),
        "session_activity": {names[row.id]: row.last_request_at for row in rows},
        "idle_timeout_seconds": settings.session_idle_seconds,
        "loaded_training_adapters": [name for run_id, name in names.items() if run_id in resident],
        "loaded_sampling_adapters": {},
        "max_training_adapters": quotas[owner].models,
        "current_training_adapter": names[rows[0].id] if rows else None,
    }


@router.post("/sessions/{session_id}/finish", responses=described_as(responses.FinishedSession))
async def finish_session(
    session_id: str, body: requests.FinishSession, sessions: Provided[Sessions], owner: Owner
) -> dict[str, str]:
    """Finish a session: its models leave the engine and unnamed samplers are removed; checkpoints stay."""
    await sessions.finish(owner, session_id, body.reason.type, body.detail)
    return {"type": "finish_session"}


@router.get("/sessions", responses=described_as(responses.SessionIds))
async def list_sessions(
    ledger: Provided[Ledger],
    owner: Owner,
    limit: Limit = 20,
    offset: Offset = 0,
    access_scope: AccessScope = "owned",
) -> dict[str, Any]:
    """List the ids of the caller's sessions, newest first."""
    found = await ledger.read(tenancy.list_sessions, owner, limit, offset)
    return {"sessions": [shown_id(row) for row in found]}


@router.put("/sessions/{session_id}/project", responses=described_as(responses.Acknowledged))
async def assign_project(
    session_id: str, body: requests.Project, sessions: Provided[Sessions], owner: Owner
) -> dict[str, str]:
    """Move a session to a project."""
    await sessions.assign_project(owner, session_id, body.project_id)
    return {"status": "changed"}


@router.get("/sessions/{session_id}", responses=described_as(responses.SessionDetails))
async def get_session(
    session_id: str,
    ledger: Provided[Ledger],
    sessions: Provided[Sessions],
    owner: Owner,
    access_scope: AccessScope = "owned",
) -> dict[str, Any]:
    """Return a session's models, samplers and metadata."""
    session = await sessions.find(owner, session_id)
    session_id = session.id
    runs = await ledger.read(tenancy.models_of_session, session_id)
    samplers = await ledger.read(tenancy.samplers_of_session, session_id)
    return {
        "training_run_ids": [run.id for run in runs],
        "sampler_ids": [sampler.id for sampler in samplers],
        "user_metadata": as_strings(session.user_metadata),
        "display_name": session.display_name,
    }


@router.post("/sessions/search", responses=described_as(responses.FoundSessions))
async def search_sessions(
    body: requests.SearchSessions, settings: Provided[Settings], ledger: Provided[Ledger], owner: Owner
) -> dict[str, Any]:
    """Search the caller's own sessions; nobody shares one."""
    since = tenancy.active_since(max(settings.session_idle_seconds, _LEAST_ACTIVE_SECONDS))
    if body.owner.type == "user" and not {owner, user_urn(owner)} & set(body.owner.owner_urns):
        return {"sessions": [], "next_cursor": None}
    wanted = tenancy.SessionFilter(
        owner,
        body.session_id,
        body.display_name,
        body.project_ids,
        body.user_metadata,
        None if body.statuses is None else [state for each in body.statuses for state in each.states()],
        since,
        None if body.cursor is None else body.cursor.last_session_id,
    )
    page, more = await ledger.read(tenancy.search, wanted, body.limit)
    stored = await ledger.read(checkpoint_rows.stored_by_session, [row.id for row in page])
    found = [
        {
            "session_id": row.id,
            "created_at": iso(row.created_at),
            "owner": user_urn(row.owner),
            "project_id": row.project_id or tenancy.NO_PROJECT,
            "status": tenancy.state_of(row, since),
            "checkpoints_count": stored.get(row.id, (0, 0))[0],
            "checkpoint_storage_bytes": stored.get(row.id, (0, 0))[1],
            "display_name": row.display_name,
            "user_metadata": as_strings(row.user_metadata),
        }
        for row in page
    ]
    last = {"last_created_at": iso(page[-1].created_at), "last_session_id": page[-1].id} if more else None
    return {"sessions": found, "next_cursor": last}


model_router = APIRouter(prefix="/api/v1", tags=["models"], route_class=BodyRoute)


@model_router.post("/create_model", responses=described_as(responses.CreateModelFuture))
async def create_model(
    body: requests.CreateModel,
    base: BaseUrl,
    creations: Provided[ModelCreations],
    owner: Owner,
    requested: RequestedDialect,
) -> dict[str, Any]:
    """Create a model. It is ready when a poll of the request says so."""
    operation, warnings = await creations.create(owner, body, base, requested)
    return future(operation) | {"message": "model creation started"} | warnings


@model_router.post("/delete_model", responses=described_as(responses.DeletedModel))
async def delete_model(body: OfModel, runs: Provided[Runs], owner: Owner) -> dict[str, Any]:
    """Delete a model, after its queued operations. Its checkpoints stay."""
    run = await runs.find_live(owner, body.model_id)
    await runs.finish(run)
    return {
        "model_id": run.name,
        "status": "deleted",
        "message": f"model {run.name} is deleted; its checkpoints stay",
        "resources_freed": ["weights", "gradients", "optimizer"],
    }


@model_router.post("/unload_model", responses=described_as(responses.Future))
async def unload_model(
    body: OfModel,
    operations: Provided[Operations],
    runs: Provided[Runs],
    owner: Owner,
    requested: RequestedDialect,
) -> dict[str, Any]:
    """Delete a model as delete_model does; a poll answers."""
    run = await runs.find_live(owner, body.model_id)
    await runs.finish(run)
    reply = {"type": "unload_model", "model_id": run.name}
    submission = Submission.done_at_once(owner, "unload_model", reply, requested or run.dialect)
    return future(await operations.accept(submission))


@model_router.post("/kill_session", responses=described_as(responses.KilledSession))
async def kill_session(
    body: requests.KillSession,
    runs: Provided[Runs],
    named_models: Provided[NamedModels],
    saves: Provided[Saves],
    owner: Owner,
) -> dict[str, Any]:
    """Unload a model after its queued operations. With `save_checkpoint` its training state is saved as
    `session_<model>_final`; with `reset_weights` a new model is created as it was."""
    run = await runs.find_trainable(owner, body.model_id)
    if body.reset_weights and run.alias is None:
        raise BadRequest("reset_weights: this model's id is its session's; create another one instead")
    path = None
    if body.save_checkpoint:
        name = f"session_{run.name.replace(':', '_')}_final"[:128]
        saving = await saves.state(run, name, overwrite=True)
        await saving.finished.wait()
        if not isinstance(saving.answer, messages.Done):
            why = saving.answer.message if isinstance(saving.answer, messages.Failed) else "the server stops"
            raise BadRequest(f"the model could not be saved, and stays: {why}")
        path = saving.reply["path"]
    await runs.finish(run)
    if body.reset_weights:
        spec = ModelSpec(run.create_message, run.optimizer, run.configuration, [])
        again = Named(run.owner, run.name, spec, run.dialect, described(spec, ""), run.user_metadata)
        await named_models.open(again)
    return {
        "success": True,
        "message": f"model {run.name} is unloaded" + (", and begins again" if body.reset_weights else ""),
        "checkpoint_path": path,
    }


@model_router.post("/get_info", responses=described_as(responses.ModelInfo))
async def get_info(
    body: OfModel,
    settings: Provided[Settings],
    base_models: Provided[BaseModels],
    runs: Provided[Runs],
    rlve: Provided[RlveRuns],
    owner: Owner,
) -> dict[str, Any]:
    """Describe a model."""
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


@model_router.get("/get_tokenizer", response_model=None, responses=described_as(responses.TokenizerFile))
async def get_tokenizer(
    model_id: str, base_models: Provided[BaseModels], runs: Provided[Runs], owner: Owner
) -> Response:
    """Return a model's tokenizer as a `tokenizer.json`, with further keys for what transformers reads from
    its other tokenizer files."""
    run = await runs.find_live(owner, model_id)
    model = base_models.named(run.base_model)
    checkpoint = model.tokenizer_id or model.name
    beside = {"model_max_length": model.max_sequence_length, "hf_checkpoint": checkpoint}

    def content() -> bytes:
        try:
            return orjson.dumps(of_folder(model.folder).description() | beside)
        except BadRequest as error:  # it has none
            raise NotFound(error.message) from None

    return Response(await asyncio.to_thread(content), media_type="application/json")
