"""Rows of operations: accepted once per natural key, answered once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, func, insert, select, update

from .schema import models, operations


def find_by_natural_key(connection: Connection, natural_key: str) -> Row | None:
    return connection.execute(select(operations).where(operations.c.natural_key == natural_key)).first()


def find(connection: Connection, request_id: str) -> Row | None:
    return connection.execute(select(operations).where(operations.c.id == request_id)).first()


def add(connection: Connection, **values: Any) -> None:
    """One that is not `accepted` is finished, and has its answer."""
    now = time.time()
    if values["state"] != "accepted":
        values |= {"finished_at": now, "answer_bytes": len(values["answer"])}
    connection.execute(insert(operations).values(accepted_at=now, **values))


def finish(
    connection: Connection,
    request_id: str,
    state: str,
    answer: bytes,
    device_seconds: float,
    payload: bytes | None,
) -> bool:
    """The first answer stays: a second one of the same operation changes nothing. Whether this is the first.

    `payload`: what a replay sends instead of running it; None: nothing.
    """
    values: dict[str, Any] = {
        "state": state,
        "answer": answer,
        "answer_bytes": len(answer),
        "device_seconds": device_seconds,
        "finished_at": time.time(),
        "payload": payload,
    }
    finished = connection.execute(
        update(operations)
        .where(operations.c.id == request_id, operations.c.state == "accepted")
        .values(values)
    )
    return finished.rowcount == 1


def advance(connection: Connection, model_id: str, seq_id: int) -> None:
    """Operations of the model up to `seq_id` had their turn."""
    connection.execute(
        update(models)
        .where(models.c.id == model_id, models.c.executed_seq < seq_id)
        .values(executed_seq=seq_id, last_request_at=time.time())
    )


def unfinished(connection: Connection) -> Sequence[Row]:
    """Everything accepted and not answered, oldest first."""
    return connection.execute(
        select(operations).where(operations.c.state == "accepted").order_by(operations.c.accepted_at)
    ).all()


def early_arrivals(connection: Connection, model_id: str, executed_seq: int) -> Sequence[Row]:
    """All operations of a model after `executed_seq`, in any state."""
    return connection.execute(
        select(operations)
        .where(operations.c.model_id == model_id, operations.c.seq_id > executed_seq)
        .order_by(operations.c.seq_id)
    ).all()


def to_replay(connection: Connection, model_id: str, after: int, through: int) -> Sequence[Row]:
    """What brings a model from the state after operation `after` to that after `through`, in order."""
    return connection.execute(
        select(operations)
        .where(
            operations.c.model_id == model_id,
            operations.c.seq_id > after,
            operations.c.seq_id <= through,
            operations.c.state != "rejected",
            operations.c.payload.is_not(None),
        )
        .order_by(operations.c.seq_id)
    ).all()


def last_seq(connection: Connection, model_id: str) -> int:
    query = select(func.max(operations.c.seq_id)).where(operations.c.model_id == model_id)
    return connection.execute(query).scalar() or 0


def forget_payloads(connection: Connection, model_id: str, through: int) -> None:
    """No replay will need them any more."""
    connection.execute(
        update(operations)
        .where(
            operations.c.model_id == model_id,
            operations.c.seq_id <= through,
            operations.c.state != "accepted",
        )
        .values(payload=None)
    )
