"""The operations of a session, and when they were what."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, Row, or_, select

from .samples import of_session
from .schema import models, operations


def timeline(connection: Connection, session_id: str, limit: int) -> Sequence[Row]:
    """The newest `limit` operations of the session's models and sampling sessions, oldest first."""
    mine = operations.c.model_id.in_(select(models.c.id).where(models.c.session_id == session_id))
    query = select(
        operations.c.id,
        operations.c.sampler_id,
        operations.c.kind,
        operations.c.model_id,
        operations.c.seq_id,
        operations.c.state,
        operations.c.device_seconds,
        operations.c.accepted_at,
        operations.c.finished_at,
    ).where(or_(mine, of_session(session_id)))
    return connection.execute(query.order_by(operations.c.accepted_at.desc()).limit(limit)).all()[::-1]


def has_operations(connection: Connection, session_id: str) -> bool:
    return bool(timeline(connection, session_id, 1))
