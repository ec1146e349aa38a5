"""Rows of samples, by the sampling session that they were asked of."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import ColumnElement, Connection, Row, select

from .schema import operations


def natural_key(sampler_id: str, seq_id: int) -> str:
    return f"sample/{sampler_id}/{seq_id}"


def seq_id_of(natural_key: str) -> int:
    return int(natural_key.rpartition("/")[2])


def _of_sampler(connection: Connection, sampler_id: str) -> ColumnElement[bool]:
    """Those with a number. Their keys are one range of the index when they are compared byte by byte."""
    key = operations.c.natural_key.collate("BINARY" if connection.dialect.name == "sqlite" else "C")
    return (key > f"sample/{sampler_id}/") & (key < f"sample/{sampler_id}0")  # "0" comes after "/"


def unanswered(connection: Connection, sampler_id: str) -> Sequence[Row]:
    mine = _of_sampler(connection, sampler_id)
    return connection.execute(select(operations).where(mine, operations.c.state == "accepted")).all()


def finished_since(connection: Connection, sampler_id: str, since: float) -> Sequence[Row]:
    """`id`, `state` and `natural_key` of those that have their answers, the oldest first."""
    query = select(operations.c.id, operations.c.state, operations.c.natural_key)
    mine = _of_sampler(connection, sampler_id)
    return connection.execute(
        query.where(mine, operations.c.finished_at >= since).order_by(operations.c.finished_at)
    ).all()
