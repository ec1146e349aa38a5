"""Rows of samples, by the sampling session that they were asked of."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import ColumnElement, Connection, Row, select

from .schema import operations, payloads


def natural_key(sampler_id: str, seq_id: int) -> str:
    return f"sample/{sampler_id}/{seq_id}"


def seq_id_of(natural_key: str) -> int:
    return int(natural_key.rpartition("/")[2])


def session_of(natural_key: str) -> str:
    """Of the sampling session's id, which begins with it."""
    return natural_key.removeprefix("sample/").partition(":sample:")[0]


def of_session(connection: Connection, session_id: str) -> ColumnElement[bool]:
    """Those with a number, of all sampling sessions of a session, also of those that are over."""
    return _with_prefix(connection, f"sample/{session_id}:sample", ":")


def _of_sampler(connection: Connection, sampler_id: str) -> ColumnElement[bool]:
    """Those with a number."""
    return _with_prefix(connection, f"sample/{sampler_id}", "/")


def _with_prefix(connection: Connection, prefix: str, separator: str) -> ColumnElement[bool]:
    """Keys are one range of the index when they are compared byte by byte."""
    key = operations.c.natural_key.collate("BINARY" if connection.dialect.name == "sqlite" else "C")
    return (key > prefix + separator) & (key < prefix + chr(ord(separator) + 1))


def unanswered(connection: Connection, sampler_id: str) -> Sequence[Row]:
    mine = _of_sampler(connection, sampler_id)
    query = select(operations, payloads.c.size).outerjoin(
        payloads, payloads.c.operation_id == operations.c.id
    )
    return connection.execute(query.where(mine, operations.c.state == "accepted")).all()


def finished_since(connection: Connection, sampler_id: str, since: float) -> Sequence[Row]:
    """`id`, `state` and `natural_key` of those that have their answers, the oldest first."""
    query = select(operations.c.id, operations.c.state, operations.c.natural_key)
    mine = _of_sampler(connection, sampler_id)
    return connection.execute(
        query.where(mine, operations.c.finished_at >= since).order_by(operations.c.finished_at)
    ).all()
