"""Uploaded losses are the operations that created them: their payloads stay until their session ends."""

from __future__ import annotations

from sqlalchemy import ColumnElement, Connection, Row, delete, func, select

from .schema import operations, payloads
from .session_rows import ROW_BYTES, charge

KIND = "create_custom_loss"


def natural_key(session_id: str, seq_id: int) -> str:
    return f"custom_loss/{session_id}/{seq_id}"


def _of_session(session_id: str) -> ColumnElement[bool]:
    return (operations.c.session_id == session_id) & (operations.c.kind == KIND)


def find(connection: Connection, natural_key: str) -> Row | None:
    """The `owner` and the `data` of one that can be used: it was checked, and its session has not ended."""
    return connection.execute(
        select(operations.c.owner, payloads.c.data)
        .join(payloads, payloads.c.operation_id == operations.c.id)
        .where(
            operations.c.natural_key == natural_key,
            operations.c.kind == KIND,
            operations.c.state == "done",
        )
    ).first()


def stored(connection: Connection, session_id: str) -> tuple[int, int]:
    """How many losses the session has, and of how many bytes."""
    query = (
        select(func.count(), func.coalesce(func.sum(payloads.c.size), 0))
        .select_from(operations)
        .join(payloads, payloads.c.operation_id == operations.c.id)
        .where(_of_session(session_id))
    )
    count, size = connection.execute(query).one()
    return count, size


def forget(connection: Connection, session_id: str) -> None:
    """They leave with their session, and so does the room that they took up."""
    count, size = stored(connection, session_id)
    charge(connection, session_id, -(size + count * ROW_BYTES))
    finished = select(operations.c.id).where(_of_session(session_id), operations.c.state != "accepted")
    connection.execute(delete(payloads).where(payloads.c.operation_id.in_(finished)))
