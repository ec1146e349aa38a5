"""Sessions of an owner by what is known of them, newest first.

What sessions take in the ledger: their own rows, and those of their models and samplers.

A session has its size in a column. A tenant's sessions may take so many bytes together; before more is
refused, sessions that have finished, or were silent for a week, leave what nothing needs any more, the oldest
first.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, case, delete, false, func, or_, select, update

from ..errors import QuotaExceeded
from .schema import checkpoints, models, samplers, sessions

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


ROW_BYTES = 512
"""What a row takes, whatever is in it, with its place in the indexes."""
SILENT_SECONDS = 7 * 24 * 3600.0
_AT_A_TIME = 1000  # rows in one change: other writers wait for it


def size_of(*values: Any) -> int:
    """The bytes of a row with these values."""
    return ROW_BYTES + sum(
        len(value) if isinstance(value, bytes) else len(json.dumps(value)) for value in values if value
    )


_OF_MODEL = (
    *("id", "owner", "session_id", "base_model", "alias", "creation"),
    *("lora", "optimizer", "user_metadata", "configuration"),
)


def size_of_model(values: Mapping[str, Any]) -> int:
    """The bytes of a model's row with these columns; those that change later do not count."""
    return size_of(*(values.get(name) for name in _OF_MODEL))


def charge(connection: Connection, session_id: str, size: int) -> None:
    """The session takes so many bytes more."""
    new = sessions.c.size_bytes + size
    taken = case((new < ROW_BYTES, ROW_BYTES), else_=new)  # less than was taken may have been counted
    connection.execute(update(sessions).where(sessions.c.id == session_id).values(size_bytes=taken))


def stored_bytes(connection: Connection, owner: str) -> int:
    query = select(func.sum(sessions.c.size_bytes)).where(sessions.c.owner == owner)
    return connection.execute(query).scalar() or 0


def require_room(connection: Connection, owner: str, limit: int) -> None:
    """Raises QuotaExceeded if the owner's sessions take as much as they may."""
    if stored_bytes(connection, owner) < limit:
        return
    _remove_empty(connection, owner)
    if stored_bytes(connection, owner) >= limit:
        _forget_descriptions(connection, owner)
    if (used := stored_bytes(connection, owner)) >= limit:
        raise QuotaExceeded(
            f"the sessions of this key's tenant, with their tags, metadata, models and samplers, take {used} "
            f"bytes in the ledger, its quota is {limit}; finish sessions that are over (ServiceClient.close, "
            "or POST /api/v1/sessions/<session>/finish)"
        )


def _finished(owner: str) -> ColumnElement[bool]:
    """Sessions that are over, also those whose clients ended without saying so."""
    silent = sessions.c.last_heartbeat_at < time.time() - SILENT_SECONDS
    return (sessions.c.owner == owner) & (sessions.c.finished_at.is_not(None) | silent)


def _remove_empty(connection: Connection, owner: str) -> None:
    """The oldest finished sessions that have neither models nor samplers."""
    has_none = ~sessions.c.id.in_(select(models.c.session_id).where(models.c.owner == owner)) & (
        ~sessions.c.id.in_(select(samplers.c.session_id).where(samplers.c.owner == owner))
    )
    oldest = select(sessions.c.id).where(_finished(owner), has_none).order_by(sessions.c.created_at)
    connection.execute(delete(sessions).where(sessions.c.id.in_(oldest.limit(_AT_A_TIME))))


def _forget_descriptions(connection: Connection, owner: str) -> None:
    """Tags and metadata of the oldest finished sessions, whose models can still be listed."""
    described = sessions.c.size_bytes > ROW_BYTES
    oldest = select(sessions.c.id).where(_finished(owner), described).order_by(sessions.c.created_at)
    emptied = update(sessions).where(sessions.c.id.in_(oldest.limit(_AT_A_TIME)))
    connection.execute(
        emptied.values(tags=[], user_metadata={}, display_name=None, finish_detail=None, size_bytes=ROW_BYTES)
    )
