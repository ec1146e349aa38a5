"""What the console shows beside the rest of the API: overview, metrics, lists; and traces of sessions."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Annotated, Any
from urllib.parse import quote

import orjson
from fastapi import APIRouter, Query
from fastapi.responses import Response, StreamingResponse
from sqlalchemy import Connection, Row

from ...access.tokens import UrlSigner
from ...checkpoints.checkpoints import Checkpoints, as_strings, iso, parse
from ...errors import BadRequest, NotFound
from ...ledger import operations, step_metrics, tenancy
from ...ledger.ledger import Ledger
from ...models.sessions import Sessions, shown_id
from ...operations.step_metrics import curve, parse_cursor
from ...wire import requests, responses
from ..bodies import BodyRoute
from ..dependencies import BaseUrl, Limit, Offset, Owner, described_as
from ..monitoring import Overview
from ..provided import Provided

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
    found = await ledger.read(
        lambda connection: step_metrics.since(connection, run.id, number=since[0], reported_at=since[1])
    )
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
    await ledger.write(lambda connection: step_metrics.report(connection, run.id, body.step, body.metrics))
    overview.activity.reported(owner, run.id)
    return {"status": "accepted"}


async def _run(ledger: Ledger, owner: str, run_id: str) -> Row:
    row = await ledger.read(lambda connection: tenancy.find_owned(connection, owner, run_id))
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
    return {
        "id": row.id,
        "name": row.alias or row.id,
        "base_model": row.base_model,
        "lora_rank": None if row.lora is None else row.lora["rank"],
        "state": row.state,
        "session_id": row.session_id,
        "created_at": iso(row.created_at),
        "last_request_at": iso(row.last_request_at),
        "user_metadata": as_strings(row.user_metadata),
        "step": last.step if last is not None and last.complete else None,
        "metrics": {} if last is None else last.metrics,
    }


@router.get("/console/sessions", responses=described_as(responses.ConsoleSessions))
async def sessions(
    ledger: Provided[Ledger], owner: Owner, limit: Limit = 50, offset: Offset = 0
) -> dict[str, Any]:
    """List one page of the caller's sessions, newest first."""
    found = await ledger.read(lambda connection: tenancy.list_sessions(connection, owner, limit, offset))
    return {
        "sessions": [
            {
                "id": row.id,
                "name": shown_id(row),
                "tags": row.tags,
                "user_metadata": as_strings(row.user_metadata),
                "sdk_version": row.sdk_version,
                "project_id": row.project_id,
                "created_at": iso(row.created_at),
                "last_heartbeat_at": iso(row.last_heartbeat_at),
                "finished_at": iso(row.finished_at),
                "finish_reason": row.finish_reason,
            }
            for row in found
        ]
    }


@router.get("/console/samplers", responses=described_as(responses.ConsoleSamplers))
async def samplers(ledger: Provided[Ledger], owner: Owner) -> dict[str, Any]:
    """List the caller's newest sampling sessions."""
    found = await ledger.read(lambda connection: tenancy.samplers_of_owner(connection, owner, _MOST_SAMPLERS))
    return {
        "samplers": [
            {
                "id": row.id,
                "session_id": row.session_id,
                "base_model": row.base_model,
                "model_path": row.model_path,
                "follows": row.follows,
                "created_at": iso(row.created_at),
            }
            for row in found
        ]
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
    parts = "/".join(quote(part, safe=":") for part in ("checkpoints", uri.segment, uri.name))
    archive = f"/api/v1/training_runs/{quote(row.run_id, safe=':')}/{parts}/archive.tar"
    save = row.directory.rpartition("-")[2]
    return {
        "url": base + signer.sign(archive, owner, save, expires),
        "expires": iso(expires),
    }


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
    return {
        "displayTimeUnit": "ms",
        "otherData": {"session_id": session_id},
        "traceEvents": events,
    }


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
    if not await ledger.read(lambda connection: operations.has_operations(connection, session_id)):
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
