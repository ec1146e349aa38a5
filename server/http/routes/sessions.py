"""Sessions: opened, kept alive, finished, listed."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any, Literal

from fastapi import APIRouter

from ...access.quotas import Quotas
from ...access.tokens import user_urn
from ...base_models import BaseModels
from ...checkpoints.checkpoints import as_strings, iso
from ...dialect import Dialect
from ...errors import NotFound
from ...ledger import checkpoints as checkpoint_rows
from ...ledger import tenancy
from ...ledger.ledger import Ledger
from ...models.run import Run
from ...models.runs import Runs
from ...models.sessions import Named, NamedModels, Sessions, check_name, described, shown_id
from ...settings import Settings
from ...wire import requests, responses
from ...wire import requests as wire
from ...wire.models import CreateModel
from ..bodies import BodyRoute
from ..dependencies import BaseUrl, Limit, Offset, Owner, Said, described_as
from ..model_creations import TIED, model_spec
from ..provided import Provided

router = APIRouter(prefix="/api/v1", tags=["sessions"], route_class=BodyRoute)

AccessScope = Literal["owned", "accessible"]
"""The same for sessions: nobody publishes one."""


_OF_MODELS = frozenset({"session_id", "base_model", "lora_config"})


@router.post("/create_session", responses=described_as(responses.CreatedSession))
async def create_session(
    body: requests.CreateSession,
    base: BaseUrl,
    settings: Provided[Settings],
    base_models: Provided[BaseModels],
    sessions: Provided[Sessions],
    named_models: Provided[NamedModels],
    owner: Owner,
    said: Said,
) -> dict[str, Any]:
    """In xorl's dialect, or with a model's fields, there is a model too, called as the session is. A client
    of tinkercloud may choose the id of a session alone."""
    given = body.model_fields_set & _OF_MODELS
    is_model = said == "xorl" or bool(given - {"session_id"} if said == "tinkercloud" else given)
    dialect = said or ("xorl" if is_model else "tinkercloud")
    fields = body.model_dump(exclude=set(_OF_MODELS)) | {"dialect": dialect}
    fields["user_metadata"] = fields["user_metadata"] or {}
    answer: dict[str, Any] = {"type": "create_session", "info_message": None, "warning_message": None}
    if is_model and said != "tinker":
        session_id = await _with_model(
            body, fields, base, settings, base_models, named_models, owner, dialect, answer
        )
    elif body.session_id is not None and said != "tinker":
        fields["display_name"] = body.session_id
        await sessions.open_named(owner, body.session_id, fields)
        session_id = body.session_id
    else:
        session_id = await sessions.create(owner, fields)
    if said == "tinker":  # which shows this to its user, and nothing that create_model answers
        answer["info_message"] = await asyncio.to_thread(_of_tied, base_models)
    return answer | {"session_id": session_id, "error_message": None}


def _of_tied(base_models: BaseModels) -> str | None:
    """What users of the SDK should know before they create a model of a base model with tied embeddings."""
    tied = [model.name for model in base_models.values() if model.is_tied]
    return f"{', '.join(tied)}: {TIED}" if tied else None


async def _with_model(
    body: requests.CreateSession,
    fields: dict[str, Any],
    base: str,
    settings: Settings,
    base_models: BaseModels,
    named_models: NamedModels,
    owner: str,
    dialect: Dialect,
    answer: dict[str, Any],
) -> str:
    """The name that session and model have. Raises BadRequest."""
    base_model = body.base_model or next(iter(base_models), "")
    base_models.named(base_model)
    asked = CreateModel(base_model=base_model, lora_config=body.lora_config)
    spec = model_spec(asked, "", dialect, settings)
    name = body.session_id or uuid.uuid4().hex
    if body.session_id is not None:
        check_name(body.session_id)
    reply = described(spec, base)
    await named_models.open(
        Named(owner, name, spec, dialect, reply, session=fields | {"display_name": body.display_name or name})
    )
    answer["info_message"] = f"model {name!r} is trained from {base_model}"
    answer["warning_message"] = "; ".join(spec.warnings) or None
    return name


@router.post("/session_heartbeat", responses=described_as(responses.SessionAlive))
async def session_heartbeat(
    body: requests.SessionHeartbeat, runs: Provided[Runs], sessions: Provided[Sessions], owner: Owner
) -> dict[str, str]:
    """Of a session, or of a model's, by what its client calls the model."""
    try:
        await sessions.heartbeat(owner, body.session_id)
    except NotFound:
        session_id = (await _of_model(body.session_id, runs, owner)).session_id
        await sessions.heartbeat(owner, session_id)
    return {"type": "session_heartbeat", "session_id": body.session_id}


async def _of_model(name: str, runs: Runs, owner: str) -> Run:
    """Raises NotFound."""
    try:
        return await runs.find_live(owner, name)
    except NotFound:
        raise NotFound(f"unknown session {name!r}: create one with create_session") from None


@router.get("/session_info", responses=described_as(responses.SessionSummary))
async def session_info(
    settings: Provided[Settings],
    quotas: Provided[Quotas],
    ledger: Provided[Ledger],
    runs: Provided[Runs],
    owner: Owner,
) -> dict[str, Any]:
    """The caller's models that are not over."""
    rows = await ledger.read(lambda connection: tenancy.active_models(connection, owner))
    resident = {run.id for run in runs.resident()}
    names = {row.id: row.alias or row.id for row in rows}
    return {
        "registered_models": list(dict.fromkeys(names.values())),
        "active_sessions": len({row.session_id for row in rows}),
        "session_activity": {names[row.id]: row.last_request_at for row in rows},
        "idle_timeout_seconds": settings.session_idle_seconds,
        "loaded_training_adapters": [name for run_id, name in names.items() if run_id in resident],
        "loaded_sampling_adapters": {},
        "max_training_adapters": quotas.of(owner).models,
        "current_training_adapter": names[rows[0].id] if rows else None,
    }


@router.post("/sessions/{session_id}/finish", responses=described_as(responses.FinishedSession))
async def finish_session(
    session_id: str, body: requests.FinishSession, sessions: Provided[Sessions], owner: Owner
) -> dict[str, str]:
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
    found = await ledger.read(lambda connection: tenancy.list_sessions(connection, owner, limit, offset))
    return {"sessions": [shown_id(row) for row in found]}


@router.put("/sessions/{session_id}/project", responses=described_as(responses.Acknowledged))
async def assign_project(
    session_id: str, body: requests.Project, sessions: Provided[Sessions], owner: Owner
) -> dict[str, str]:
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
    session = await sessions.find(owner, session_id)
    session_id = session.id
    runs = await ledger.read(lambda connection: tenancy.models_of_session(connection, session_id))
    samplers = await ledger.read(lambda connection: tenancy.samplers_of_session(connection, session_id))
    return {
        "training_run_ids": [run.id for run in runs],
        "sampler_ids": [sampler.id for sampler in samplers],
        "user_metadata": as_strings(session.user_metadata),
        "display_name": session.display_name,
    }


# Heartbeats are written down once a minute.
_LEAST_ACTIVE_SECONDS = 180.0


@router.post("/sessions/search", responses=described_as(responses.FoundSessions))
async def search_sessions(
    body: wire.SearchSessions, settings: Provided[Settings], ledger: Provided[Ledger], owner: Owner
) -> dict[str, Any]:
    """Only one's own sessions, whoever's are asked for: nobody shares one."""
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
    page, more = await ledger.read(lambda connection: tenancy.search(connection, wanted, body.limit))
    stored = await ledger.read(
        lambda connection: checkpoint_rows.stored_by_session(connection, [row.id for row in page])
    )
    found = []
    for row in page:
        count, size = stored.get(row.id, (0, 0))
        found.append(
            {
                "session_id": row.id,
                "created_at": iso(row.created_at),
                "owner": user_urn(row.owner),
                "project_id": row.project_id or tenancy.NO_PROJECT,
                "status": tenancy.state_of(row, since),
                "checkpoints_count": count,
                "checkpoint_storage_bytes": size,
                "display_name": row.display_name,
                "user_metadata": as_strings(row.user_metadata),
            }
        )
    last = {"last_created_at": iso(page[-1].created_at), "last_session_id": page[-1].id} if more else None
    return {"sessions": found, "next_cursor": last}
