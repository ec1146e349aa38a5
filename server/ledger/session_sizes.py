"""What sessions take in the ledger: their own rows, and those of their models and samplers.

A session has its size in a column. A tenant's sessions may take so many bytes together; before more is
refused, sessions that have finished, or were silent for a week, leave what nothing needs any more, the oldest
first.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from sqlalchemy import ColumnElement, Connection, case, delete, func, select, update

from ..errors import QuotaExceeded
from .schema import models, samplers, sessions

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
