"""Rows of samples, by the sampling session that they were asked of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, Row, select

from .schema import operations, payloads

KIND = "sample"


@dataclass(frozen=True)
class SampleNumber:
    """The number that a client gives to a sample of a sampling session; used again, it is the same sample."""

    session_id: str
    sampler_id: str
    number: int

    @property
    def natural_key(self) -> str:
        return f"sample/{self.sampler_id}/{self.number}"


def of_session(session_id: str) -> ColumnElement[bool]:
    """Numbered samples of all sampling sessions of a session, also of those that are over."""
    return (operations.c.session_id == session_id) & (operations.c.kind == KIND)


def _of_sampler(session_id: str, sampler_id: str) -> ColumnElement[bool]:
    return of_session(session_id) & (operations.c.sampler_id == sampler_id)


def unanswered(connection: Connection, session_id: str, sampler_id: str) -> Sequence[Row]:
    """The sampling session's numbered samples that have no answer yet."""
    mine = _of_sampler(session_id, sampler_id)
    query = select(operations, payloads.c.size).outerjoin(
        payloads, payloads.c.operation_id == operations.c.id
    )
    return connection.execute(query.where(mine, operations.c.state == "accepted")).all()


def finished_since(connection: Connection, session_id: str, sampler_id: str, since: float) -> Sequence[Row]:
    """`id`, `state` and `sample_number` of its samples that have their answers, the oldest first."""
    query = select(operations.c.id, operations.c.state, operations.c.sample_number)
    mine = _of_sampler(session_id, sampler_id)
    return connection.execute(
        query.where(mine, operations.c.finished_at >= since).order_by(operations.c.finished_at)
    ).all()
