"""What a session's operations did when: a trace, behind a URL that needs no key."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import orjson
from fastapi import APIRouter
from fastapi.responses import Response
from sqlalchemy import Row

from ...access.tokens import UrlSigner
from ...ledger import operations as rows
from ...ledger.ledger import Ledger
from ...models.sessions import Sessions
from ...wire import responses
from ..dependencies import BaseUrl, Owner, described_as
from ..provided import Provided


def chrome_trace(session_id: str, operations: Sequence[Row]) -> dict[str, Any]:
    """Times are microseconds since 1970. Operations without an answer end now."""
    now = time.time()
    processes: dict[str, int] = {}
    events: list[dict[str, Any]] = []
    for row in operations:
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


router = APIRouter(prefix="/api/v1/sessions/{session_id}", tags=["traces"])

_MOST_OPERATIONS = 50_000


@router.get("/trace_export", responses=described_as(responses.TraceReady | responses.TraceFailed))
async def trace_export(
    session_id: str,
    base: BaseUrl,
    signer: Provided[UrlSigner],
    ledger: Provided[Ledger],
    sessions: Provided[Sessions],
    owner: Owner,
) -> dict[str, Any]:
    """Clients ask until it is `ready` or `failed`; it is at once."""
    session_id = (await sessions.find(owner, session_id)).id
    if not await ledger.read(lambda connection: rows.has_operations(connection, session_id)):
        return {"status": "failed", "error": "the ledger has no operations of this session, or no more"}
    path = f"/api/v1/sessions/{session_id}/trace"
    signed = signer.sign(path, owner, "", signer.expiry())
    return {"status": "ready", "url": base + signed}


@router.get("/trace", responses=described_as(responses.Trace))
async def trace(
    session_id: str, ledger: Provided[Ledger], sessions: Provided[Sessions], owner: Owner
) -> Response:
    """Of the newest operations that the ledger has."""
    session_id = (await sessions.find(owner, session_id)).id

    body = await ledger.read(
        lambda connection: orjson.dumps(
            chrome_trace(session_id, rows.timeline(connection, session_id, _MOST_OPERATIONS))
        )
    )
    headers = {"Content-Disposition": f'attachment; filename="{session_id}.json"'}
    return Response(body, media_type="application/json", headers=headers)
