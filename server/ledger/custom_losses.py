"""Uploaded losses are the operations that created them: their payloads stay until their session ends."""

from __future__ import annotations

from sqlalchemy import ColumnElement, Connection, Row, func, select, update

from .schema import operations

KIND = "create_custom_loss"


def natural_key(session_id: str, seq_id: int) -> str:
    return f"custom_loss/{session_id}/{seq_id}"


def _of_session(session_id: str) -> ColumnElement[bool]:
    first = natural_key(session_id, 0)[:-1]
    after = first[:-1] + chr(ord("/") + 1)
    return (operations.c.natural_key >= first) & (operations.c.natural_key < after)


def find(connection: Connection, natural_key: str) -> Row | None:
    """One that can be used: it was checked, and its session has not ended."""
    return connection.execute(
        select(operations).where(
            operations.c.natural_key == natural_key,
            operations.c.kind == KIND,
            operations.c.state == "done",
            operations.c.payload.is_not(None),
        )
    ).first()


def stored(connection: Connection, session_id: str) -> tuple[int, int]:
    """How many losses the session has, and of how many bytes."""
    query = select(func.count(), func.coalesce(func.sum(func.length(operations.c.payload)), 0)).where(
        _of_session(session_id), operations.c.payload.is_not(None)
    )
    count, size = connection.execute(query).one()
    return count, size


def forget(connection: Connection, session_id: str) -> None:
    connection.execute(
        update(operations)
        .where(_of_session(session_id), operations.c.state != "accepted")
        .values(payload=None)
    )
