"""Sessions: opened, kept alive, finished, listed."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter

from ..checkpoints import as_strings
from ..ledger import tenancy
from ..wire import requests
from . import BackendOf, Limit, Offset, Owner

router = APIRouter(prefix="/api/v1", tags=["sessions"])

AccessScope = Literal["owned", "accessible"]
"""The same for sessions: nobody publishes one."""


@router.post("/create_session")
async def create_session(body: requests.CreateSession, backend: BackendOf, owner: Owner) -> dict[str, Any]:
    fields = body.model_dump()
    fields["user_metadata"] = fields["user_metadata"] or {}
    session_id = await backend.sessions.create(owner, fields)
    return {"type": "create_session", "session_id": session_id}


@router.post("/session_heartbeat")
async def session_heartbeat(
    body: requests.SessionHeartbeat, backend: BackendOf, owner: Owner
) -> dict[str, str]:
    await backend.sessions.heartbeat(owner, body.session_id)
    return {"type": "session_heartbeat"}


@router.post("/sessions/{session_id}/finish")
async def finish_session(
    session_id: str, body: requests.FinishSession, backend: BackendOf, owner: Owner
) -> dict[str, str]:
    await backend.sessions.finish(owner, session_id, body.reason.type, body.detail)
    return {"type": "finish_session"}


@router.get("/sessions")
async def list_sessions(
    backend: BackendOf,
    owner: Owner,
    limit: Limit = 20,
    offset: Offset = 0,
    access_scope: AccessScope = "owned",
) -> dict[str, Any]:
    found = await backend.ledger.read(
        lambda connection: tenancy.list_sessions(connection, owner, limit, offset)
    )
    return {"sessions": list(found)}


@router.put("/sessions/{session_id}/project")
async def assign_project(
    session_id: str, body: requests.Project, backend: BackendOf, owner: Owner
) -> dict[str, str]:
    await backend.sessions.assign_project(owner, session_id, body.project_id)
    return {"status": "changed"}


@router.get("/sessions/{session_id}")
async def get_session(
    session_id: str, backend: BackendOf, owner: Owner, access_scope: AccessScope = "owned"
) -> dict[str, Any]:
    session = await backend.sessions.find(owner, session_id)
    runs = await backend.ledger.read(lambda connection: tenancy.models_of_session(connection, session_id))
    samplers = await backend.ledger.read(
        lambda connection: tenancy.samplers_of_session(connection, session_id)
    )
    return {
        "training_run_ids": [run.id for run in runs],
        "sampler_ids": [sampler.id for sampler in samplers],
        "user_metadata": as_strings(session.user_metadata),
        "display_name": session.display_name,
    }
