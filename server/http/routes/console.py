"""A tenant's view of its own work: the console's overview and lists, metrics, traces, usage, audit, keys."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Query
from fastapi.responses import Response, StreamingResponse
from sqlalchemy import Connection, Row

from ...access import ApiKeys, Claims, Quotas, Tokens, UrlSigner, user_urn
from ...checkpoints import Checkpoints, as_strings, iso, parse
from ...errors import BadRequest, Forbidden, NotFound
from ...ledger import accounts, operations, step_metrics, tenancy
from ...ledger import checkpoints as checkpoint_rows
from ...ledger.ledger import Ledger
from ...ledger.tenancy import NO_PROJECT
from ...models.sessions import Sessions, shown_id
from ...operations.curves import curve, parse_cursor
from ...wire import requests, responses
from ..bodies import BodyRoute
from ..dependencies import BaseUrl, CallerOf, Limit, Offset, Owner, Provided, described_as
from ..monitoring import Overview

router = APIRouter(prefix="/api/v1", tags=["console"], route_class=BodyRoute)

_MOST_SAMPLERS = 500


# --- metrics of runs


@router.get("/training_runs/{run_id}/metrics", responses=described_as(responses.RunMetrics))
async def run_metrics(
    run_id: str, ledger: Provided[Ledger], owner: Owner, cursor: str = "0"
) -> dict[str, Any]:
    """List the steps of a run with their metrics, oldest first; old steps are thinned. With the `cursor` of
    an earlier answer: only steps that were incomplete then, or reported since."""
    try:
        since = parse_cursor(cursor)
    except ValueError:
        raise BadRequest(f"cursor: {cursor[:64]!r} is none of this route's; leave it out to begin") from None
    run = await _run(ledger, owner, run_id)
    found = await ledger.read(step_metrics.since, run.id, number=since[0], reported_at=since[1])
    read = curve(found, since)
    return {"run_id": run.id, "points": [asdict(point) for point in read.points], "cursor": read.cursor}


@router.post("/training_runs/{run_id}/metrics", responses=described_as(responses.Acknowledged))
async def report_metrics(
    run_id: str,
    body: requests.StepMetrics,
    ledger: Provided[Ledger],
    overview: Provided[Overview],
    owner: Owner,
) -> dict[str, str]:
    """Add a client's own metrics, such as rewards, to a step of its run. The newest value of each counts."""
    run = await _run(ledger, owner, run_id)
    await ledger.write(step_metrics.report, run.id, body.step, body.metrics)
    overview.reported(owner, run.id)
    return {"status": "accepted"}


async def _run(ledger: Ledger, owner: str, run_id: str) -> Row:
    row = await ledger.read(tenancy.find_owned, owner, run_id)
    if row is None:
        raise NotFound(f"unknown training run {run_id!r}")
    return row


# --- overview


@router.get("/console/overview", responses=described_as(responses.Overview))
async def overview(overview: Provided[Overview], owner: Owner) -> dict[str, Any]:
    """Describe the engine, the queue of the caller's operations, and the disk, as they are now."""
    return overview.of(owner)


# Not in the OpenAPI document, which describes answers that end.
@router.get("/console/events", include_in_schema=False)
async def events(
    overview: Provided[Overview], owner: Owner, looks: Annotated[int | None, Query(ge=1)] = None
) -> StreamingResponse:
    """Stream the overview as server-sent events: at once, and whenever it has changed, at most once a second.
    `looks`: after how many seconds the stream ends."""
    overview.require_stream(owner)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(overview.events(owner, looks), media_type="text/event-stream", headers=headers)


# --- lists


@router.get("/console/runs", responses=described_as(responses.ConsoleRuns))
async def runs(
    ledger: Provided[Ledger], owner: Owner, limit: Limit = 50, offset: Offset = 0
) -> dict[str, Any]:
    """List one page of the caller's runs, last used first, each with the metrics of its newest step."""

    def read(connection: Connection) -> tuple[Sequence[Row], int, Sequence[Row]]:
        page, total = tenancy.list_models(connection, tenancy.models_of(owner), limit, offset)
        return page, total, step_metrics.newest(connection, [row.id for row in page])

    page, total, found = await ledger.read(read)
    newest: dict[str, list[Row]] = {}
    for row in found:
        newest.setdefault(row.model_id, []).append(row)
    return {"runs": [_shown(row, newest.get(row.id, [])) for row in page], "total": total}


def _shown(row: Row, newest: list[Row]) -> dict[str, Any]:
    points = [point for point in curve(newest, (0, 0.0)).points if point.metrics]
    last = max(points, key=lambda point: (point.complete, point.time), default=None)
    fields = _fields(row, ("id", "base_model", "state", "session_id"), ("created_at", "last_request_at"))
    return fields | {
        "name": row.alias or row.id,
        "lora_rank": None if row.lora is None else row.lora["rank"],
        "user_metadata": as_strings(row.user_metadata),
        "step": last.step if last is not None and last.complete else None,
        "metrics": {} if last is None else last.metrics,
    }


@router.get("/console/sessions", responses=described_as(responses.ConsoleSessions))
async def sessions(
    ledger: Provided[Ledger], owner: Owner, limit: Limit = 50, offset: Offset = 0
) -> dict[str, Any]:
    """List one page of the caller's sessions, newest first."""
    found = await ledger.read(tenancy.list_sessions, owner, limit, offset)
    fields = ("id", "tags", "sdk_version", "project_id", "finish_reason")
    times = ("created_at", "last_heartbeat_at", "finished_at")
    return {
        "sessions": [
            _fields(row, fields, times)
            | {"name": shown_id(row), "user_metadata": as_strings(row.user_metadata)}
            for row in found
        ]
    }


def _fields(row: Row, names: Sequence[str], times: Sequence[str]) -> dict[str, Any]:
    """Return columns of a row, those of `times` as ISO dates."""
    return {name: getattr(row, name) for name in names} | {name: iso(getattr(row, name)) for name in times}


@router.get("/console/samplers", responses=described_as(responses.ConsoleSamplers))
async def samplers(ledger: Provided[Ledger], owner: Owner) -> dict[str, Any]:
    """List the caller's newest sampling sessions."""
    found = await ledger.read(tenancy.samplers_of_owner, owner, _MOST_SAMPLERS)
    fields = ("id", "session_id", "base_model", "model_path", "follows")
    return {"samplers": [_fields(row, fields, ("created_at",)) for row in found]}


@router.get("/console/usage", responses=described_as(responses.TenantsUsage))
async def tenants_usage(
    ledger: Provided[Ledger],
    quotas: Provided[Quotas],
    owner: Owner,
    days: Annotated[int, Query(ge=1, le=400)] = 13,
) -> dict[str, Any]:
    """Sum up what tenants have used in the last days: all tenants for keys of an administrator (`--admin`),
    the caller's own for others."""
    sees_all = quotas[owner].tenant_class == "admin"
    rows = await ledger.read(accounts.tenants_usage, time.time() - days * 86400)
    return {
        "all_tenants": sees_all,
        "tenants": [
            {"tenant": row.owner} | {name: int(getattr(row, name)) for name in accounts.COUNTERS}
            for row in rows
            if sees_all or row.owner == owner
        ],
    }


@router.get("/console/download", responses=described_as(responses.DownloadUrl))
async def download(
    path: str, base: BaseUrl, signer: Provided[UrlSigner], checkpoints: Provided[Checkpoints], owner: Owner
) -> dict[str, str | None]:
    """Return a URL of a checkpoint's archive that needs no key until it expires."""
    uri = parse(path)
    row = await checkpoints.find(owner, uri)
    await checkpoints.record_read(owner, row)
    expires = signer.expiry()
    archive = f"/api/v1/training_runs/{row.run_id}/checkpoints/{uri.checkpoint_id}/archive.tar"
    save = row.directory.rpartition("-")[2]
    return {"url": base + signer.sign(archive, owner, save, expires), "expires": iso(expires)}


def chrome_trace(session_id: str, timeline: Sequence[Row]) -> dict[str, Any]:
    """Draw operations as a trace. Times are microseconds since 1970; operations without an answer end now."""
    now = time.time()
    processes: dict[str, int] = {}
    events: list[dict[str, Any]] = []
    for row in timeline:
        name = row.model_id or row.sampler_id
        process = processes.setdefault(name, len(processes) + 1)
        if process == len(processes):
            events.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}})
        events += _slices(row, process, now)
    return {"displayTimeUnit": "ms", "otherData": {"session_id": session_id}, "traceEvents": events}


def _slices(row: Row, process: int, now: float) -> Iterator[dict[str, Any]]:
    def event(phase: str, name: str, at: float, **more: Any) -> dict[str, Any]:
        shared = {"cat": "operation", "id": row.id, "pid": process, "tid": process}
        return shared | {"ph": phase, "name": name, "ts": round(at * 1e6)} | more

    submitted, finished = row.accepted_at, row.finished_at or now
    seen = {"request_id": row.id, "seq_id": row.seq_id, "state": row.state}
    yield event("b", row.kind, submitted, args=seen)
    if row.finished_at is not None and row.device_seconds:
        started = max(submitted, finished - row.device_seconds)
        yield event("b", "on the device", started)
        yield event("e", "on the device", finished)
    yield event("e", row.kind, finished)


trace_router = APIRouter(prefix="/api/v1/sessions/{session_id}", tags=["traces"])

_MOST_OPERATIONS = 50_000


@trace_router.get("/trace_export", responses=described_as(responses.TraceReady | responses.TraceFailed))
async def trace_export(
    session_id: str,
    base: BaseUrl,
    signer: Provided[UrlSigner],
    ledger: Provided[Ledger],
    sessions: Provided[Sessions],
    owner: Owner,
) -> dict[str, Any]:
    """Return a URL of the session's trace that needs no key. Clients poll this; here it is ready at once."""
    session_id = (await sessions.find(owner, session_id)).id
    if not await ledger.read(operations.has_operations, session_id):
        return {"status": "failed", "error": "the ledger has no operations of this session, or no more"}
    path = f"/api/v1/sessions/{session_id}/trace"
    signed = signer.sign(path, owner, "", signer.expiry())
    return {"status": "ready", "url": base + signed}


@trace_router.get("/trace", responses=described_as(responses.Trace))
async def trace(
    session_id: str, ledger: Provided[Ledger], sessions: Provided[Sessions], owner: Owner
) -> Response:
    """Draw the newest operations of a session that the ledger has."""
    session_id = (await sessions.find(owner, session_id)).id

    body = await ledger.read(
        lambda connection: orjson.dumps(
            chrome_trace(session_id, operations.timeline(connection, session_id, _MOST_OPERATIONS))
        )
    )
    headers = {"Content-Disposition": f'attachment; filename="{session_id}.json"'}
    return Response(body, media_type="application/json", headers=headers)


account_router = APIRouter(prefix="/api/v1", tags=["accounts"])

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


@account_router.get("/audit", responses=described_as(responses.AuditLog))
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
        accounts.audit_entries, owner, midnight, midnight + 86400, _RESOURCES[event_type], _MOST_ENTRIES
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


@account_router.get("/billing/usage/events", responses=described_as(responses.Usage))
async def usage_events(
    ledger: Provided[Ledger], owner: Owner, starting_on: datetime, ending_before: datetime
) -> dict[str, Any]:
    """List what was used: one event per hour, kind, base model, session and training run."""
    first, end = _hour("starting_on", starting_on), _hour("ending_before", ending_before)
    if not first < end <= first + _MOST_DAYS * 24:
        raise BadRequest(f"ending_before: choose one to {_MOST_DAYS * 24} hours after starting_on")
    if first * accounts.HOUR > time.time():
        raise BadRequest("starting_on: it is in the future")
    used = await ledger.read(accounts.usage_between, owner, first, end)
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


@account_router.get("/billing/usage/checkpoints/current", responses=described_as(responses.CheckpointStorage))
async def checkpoint_storage(
    ledger: Provided[Ledger], owner: Owner, project_id: str | None = None
) -> dict[str, Any]:
    """Sum up the tenant's checkpoints as they are now, by the projects of their sessions."""
    stored = await ledger.read(checkpoint_rows.stored_by_project, owner, project_id)
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
    await ledger.write(accounts.revoke_key, key.id)
    await keys.read(ledger)
    return {"status": "revoked"}
