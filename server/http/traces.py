"""A session's operations as a Chrome trace, for ui.perfetto.dev and chrome://tracing.

https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU ("Trace Event Format"): each
model and each sampling session is a process; an operation is a nestable async slice from its submit to its
answer, and in it one of the time that it held the device, which ends with the answer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import Row


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
