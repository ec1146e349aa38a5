"""Sessions of an owner by what is known of them, newest first."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, false, func, or_, select

from .schema import checkpoints, models, sessions

NO_PROJECT = "default"
"""What the project of a session that names none is called."""


@dataclass(frozen=True)
class SessionFilter:
    """`before`: the session that the page before ended with. `states`: `active` and finish reasons; None:
    every state. With both `session_id` and `display_name` a session matches by either."""

    owner: str
    session_id: str | None = None
    display_name: str | None = None
    project_ids: list[str] | None = None
    user_metadata: dict[str, str] = field(default_factory=dict)
    states: list[str] | None = None
    active_since: float = 0.0
    before: str | None = None


def active_since(seconds: float) -> float:
    return time.time() - seconds


def _clauses(connection: Connection, wanted: SessionFilter) -> Iterator[ColumnElement[bool]]:
    yield sessions.c.owner == wanted.owner
    if wanted.project_ids is not None:
        yield func.coalesce(sessions.c.project_id, NO_PROJECT).in_(wanted.project_ids)
    if wanted.states is not None:
        lives = sessions.c.finished_at.is_(None) & (sessions.c.last_heartbeat_at >= wanted.active_since)
        reasons = [state for state in wanted.states if state != "active"]
        yield or_(lives if "active" in wanted.states else false(), sessions.c.finish_reason.in_(reasons))
    if wanted.before is not None:
        query = select(sessions.c.created_at).where(sessions.c.id == wanted.before)
        at = connection.execute(query.where(sessions.c.owner == wanted.owner)).scalar()
        younger = (sessions.c.created_at == at) & (sessions.c.id < wanted.before)
        yield false() if at is None else or_(sessions.c.created_at < at, younger)


def _matches(row: Row, wanted: SessionFilter) -> bool:
    """What databases compare each in their own way: text without regard to case, and values of JSON."""
    metadata = row.user_metadata or {}
    if any(key not in metadata or str(metadata[key]) != value for key, value in wanted.user_metadata.items()):
        return False
    if wanted.session_id is None and wanted.display_name is None:
        return True
    if row.id == wanted.session_id:
        return True
    words = None if wanted.display_name is None else wanted.display_name.casefold().split()
    name = (row.display_name or "").casefold()
    return words is not None and all(word in name for word in words)


def search(connection: Connection, wanted: SessionFilter, limit: int) -> tuple[list[Row], bool]:
    """A page, and whether there is another one."""
    query = select(sessions).where(*_clauses(connection, wanted))
    found: list[Row] = []
    for row in connection.execute(query.order_by(sessions.c.created_at.desc(), sessions.c.id.desc())):
        if _matches(row, wanted):
            if len(found) == limit:
                return found, True
            found.append(row)
    return found, False


def stored(connection: Connection, session_ids: list[str]) -> dict[str, tuple[int, int]]:
    """The number of checkpoints of sessions, and their bytes; sessions without any are left out."""
    alive = (checkpoints.c.state == "complete") & or_(
        checkpoints.c.expires_at.is_(None), checkpoints.c.expires_at > time.time()
    )
    query = (
        select(models.c.session_id, func.count(), func.sum(checkpoints.c.size_bytes))
        .join(models, models.c.id == checkpoints.c.run_id)
        .where(models.c.session_id.in_(session_ids), alive)
        .group_by(models.c.session_id)
    )
    return {session: (count, size or 0) for session, count, size in connection.execute(query)}


def state_of(row: Row, active_since: float) -> dict[str, Any] | None:
    """None: it neither finished nor gave a sign of life since then."""
    if row.finished_at is not None:
        reason = {"type": row.finish_reason or "success"}
        return {"type": "client_finished", "reason": reason, "detail": row.finish_detail}
    return {"type": "active"} if row.last_heartbeat_at >= active_since else None
