"""What a tenant did and used (the audit log, usage by the hour, storage of checkpoints), and its API keys.

Nothing has a price.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from typing import Any, Literal

from fastapi import APIRouter
from sqlalchemy import Row

from ...access.keys import ApiKeys
from ...access.tokens import Claims, Tokens, user_urn
from ...checkpoints.checkpoints import as_strings, iso
from ...errors import BadRequest, Forbidden
from ...ledger import accounts
from ...ledger import checkpoints as checkpoint_rows
from ...ledger.ledger import Ledger
from ...ledger.tenancy import NO_PROJECT
from ...wire import responses
from ..dependencies import CallerOf, Owner, described_as
from ..provided import Provided

router = APIRouter(prefix="/api/v1", tags=["accounts"])

# Events are called after a resource. Of teams and organizations there are none here.
_RESOURCES = {
    "all": None,
    "checkpoints": "checkpoint",
    "projects": "project",
    "teams": "team",
    "organizations": "organization",
}
_MOST_ENTRIES = 50_000
_MOST_DAYS = 14
_GIGABYTE = 1e9


@router.get("/audit", responses=described_as(responses.AuditLog))
async def audit_log(
    ledger: Provided[Ledger],
    owner: Owner,
    event_type: Literal["all", "checkpoints", "projects", "teams", "organizations"] = "all",
    day: date | None = None,
) -> dict[str, Any]:
    """List the tenant's entries of a day of UTC, by default today, oldest first; of very many only the
    newest."""
    midnight = datetime.combine(day or datetime.now(UTC).date(), datetime.min.time(), UTC).timestamp()
    found = await ledger.read(
        lambda connection: accounts.audit_entries(
            connection, owner, midnight, midnight + 86400, _RESOURCES[event_type], _MOST_ENTRIES
        )
    )
    return {"entries": [_entry(row) for row in found]}


def _entry(row: Row) -> dict[str, Any]:
    """Describe an entry. Those about checkpoints repeat some details beside them, for older clients."""
    entry = {
        "timestamp": iso(row.at),
        "event": row.event,
        "event_details": {"user": user_urn(row.owner)} | row.details,
    }
    if row.event.startswith("checkpoint_"):
        entry |= {name: row.details.get(name) for name in ("model_id", "tinker_path", "purpose")}
    return entry


@router.get("/billing/usage/events", responses=described_as(responses.Usage))
async def usage_events(
    ledger: Provided[Ledger], owner: Owner, starting_on: datetime, ending_before: datetime
) -> dict[str, Any]:
    """List what was used: one event per hour, kind, base model, session and training run."""
    first, end = _hour("starting_on", starting_on), _hour("ending_before", ending_before)
    if not first < end <= first + _MOST_DAYS * 24:
        raise BadRequest(f"ending_before: choose one to {_MOST_DAYS * 24} hours after starting_on")
    if first * accounts.HOUR > time.time():
        raise BadRequest("starting_on: it is in the future")
    used = await ledger.read(lambda connection: accounts.usage_between(connection, owner, first, end))
    events = [event for row in used for event in _events(row)]
    events.sort(key=lambda event: (event["bucket_start"], -event["event_info"].get("token_count", 0)))
    sessions = {row.session_id: {"user_metadata": as_strings(row.user_metadata)} for row in used}
    sessions.pop("", None)
    return {"data": events, "sessions": sessions}


def _hour(name: str, at: datetime) -> int:
    """Return a time in hours since 1970. Without a zone it is UTC. Raises BadRequest for a part of an
    hour."""
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    hours, rest = divmod(at - datetime.fromtimestamp(0, UTC), timedelta(hours=1))
    if rest:
        raise BadRequest(f"{name}: {at.isoformat()} is not the beginning of an hour of UTC")
    return hours


def _events(row: Row) -> Iterator[dict[str, Any]]:
    shared = {
        "bucket_start": iso(row.hour * accounts.HOUR),
        "bucket_end": iso((row.hour + 1) * accounts.HOUR),
        "base_model": row.base_model,
        "user_id": user_urn(row.owner),
        "user_name": row.owner,
        "session_id": row.session_id or None,
        "project_id": (row.project_id or NO_PROJECT) if row.session_id else None,
        "training_run_id": row.run_id or None,
    }
    kinds: list[dict[str, Any]] = [
        {"type": "training", "token_count": row.trained},
        {"type": "sampling_prefill", "cached": False, "token_count": row.prefilled},
        {"type": "sampling_prefill", "cached": True, "token_count": row.prefilled_cached},
        {"type": "sampling_sample", "token_count": row.sampled},
        {"type": "checkpoint", "count": row.checkpoints},
    ]
    for kind in kinds:
        if kind.get("token_count") or kind.get("count"):
            yield shared | {"event_info": kind}


@router.get("/billing/usage/checkpoints/current", responses=described_as(responses.CheckpointStorage))
async def checkpoint_storage(
    ledger: Provided[Ledger], owner: Owner, project_id: str | None = None
) -> dict[str, Any]:
    """Sum up the tenant's checkpoints as they are now, by the projects of their sessions."""
    stored = await ledger.read(
        lambda connection: checkpoint_rows.stored_by_project(connection, owner, project_id)
    )
    return {
        "data": [
            {
                "project_id": row.project_id,
                "org_user_urn": user_urn(owner),
                "user_name": owner,
                "checkpoint_count": row.number,
                "size_bytes": row.size_bytes or 0,
                "size_gigabytes": (row.size_bytes or 0) / _GIGABYTE,
            }
            for row in stored
        ]
    }


key_router = APIRouter(prefix="/api/v1/auth", tags=["credentials"])


@key_router.post("/token", responses=described_as(responses.Token))
async def exchange(tokens: Provided[Tokens], caller: CallerOf) -> dict[str, str]:
    """Return a token for the caller's key. A caller with a token gets the same one: a stolen one cannot be
    renewed."""
    if caller.token is not None:
        return {"jwt": caller.token}
    assert caller.key is not None  # no URL of this route is signed
    return {"jwt": tokens.issue(Claims(caller.owner, caller.key.id))}


@key_router.get("/apikey/me", responses=described_as(responses.KeyInfo))
async def api_key(caller: CallerOf) -> dict[str, Any]:
    """Describe the caller's key, for the SDK's `auth login`. `tinsmith keys revoke` takes its `name`. The
    server knows no e-mail addresses and gives the tenant's name instead."""
    key = caller.key
    assert key is not None
    return {
        "key_id": int(key.id or "0", 16),
        "name": key.id or "none",
        "note": key.note,
        "details": {"org_details": {"name": caller.owner}, "user_details": {"email": caller.owner}},
    }


@key_router.delete("/apikey/me", responses=described_as(responses.Acknowledged))
async def revoke_api_key(
    keys: Provided[ApiKeys], ledger: Provided[Ledger], caller: CallerOf
) -> dict[str, str]:
    """Revoke the key that the request was sent with."""
    key = caller.key
    if caller.token is not None:
        raise Forbidden("a token cannot revoke its key; send the key itself")
    if key is None or not key.in_ledger:
        raise Forbidden("this key was given to the server at its start, and is taken away there")
    await ledger.write(lambda connection: accounts.revoke_key(connection, key.id))
    await keys.read(ledger)
    return {"status": "revoked"}
