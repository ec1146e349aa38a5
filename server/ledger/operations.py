"""Rows of operations: accepted once per natural key, answered once.

Numbered samples are listed by sampling session. An uploaded loss is the operation that created it; its
payload stays until its session ends. With the answer of a pass or a step its tokens are counted, and its
metrics kept for curves (step_metrics.py).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Select,
    bindparam,
    delete,
    func,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from . import accounts
from .payloads import ADD as _ADD_PAYLOAD
from .payloads import Stored
from .payloads import drop as drop_payload
from .schema import models, operations, payloads, step_metrics
from .tenancy import ROW_BYTES, charge


def _with_sizes() -> Select:
    """Select operations, and the `size` of each one's payload."""
    return select(operations, payloads.c.size).outerjoin(payloads, payloads.c.operation_id == operations.c.id)


# Statements of every operation, built once: SQLAlchemy takes longer to build and key one than to run it.
_ADD = insert(operations)
_BY_NATURAL_KEY = _with_sizes().where(operations.c.natural_key == bindparam("key"))
_BY_ID = _with_sizes().where(operations.c.id == bindparam("key"))
_FINISH = update(operations).where(operations.c.id == bindparam("key"), operations.c.state == "accepted")
_ADVANCE = update(models).where(models.c.id == bindparam("key"), models.c.executed_seq < bindparam("seq"))
_ADD_METRICS: dict[str, Any] = {
    "sqlite": sqlite.insert(step_metrics).on_conflict_do_nothing(),
    "postgresql": postgresql.insert(step_metrics).on_conflict_do_nothing(),
}
_MOST_METRICS, _MOST_NAME = 64, 128  # in one row; characters of a name
_METRICS_BYTES = 100  # what a row takes beside its metrics


def find_by_natural_key(connection: Connection, natural_key: str) -> Row | None:
    return connection.execute(_BY_NATURAL_KEY, {"key": natural_key}).first()


def find(connection: Connection, request_id: str) -> Row | None:
    return connection.execute(_BY_ID, {"key": request_id}).first()


def add(connection: Connection, values: dict[str, Any], stored: Stored | None = None) -> None:
    """Add an operation, and its payload, if the engine is to compute it.

    One that is not `accepted` is finished, and comes with its answer.
    """
    now = time.time()
    row = values | {"accepted_at": now}
    if row["state"] != "accepted":
        row |= {"finished_at": now, "answer_bytes": len(row["answer"])}
    connection.execute(_ADD, row)
    if stored is not None:
        key = {"operation_id": row["id"], "model_id": row.get("model_id"), "seq_id": row.get("seq_id")}
        connection.execute(_ADD_PAYLOAD, key | vars(stored))


def finish(
    connection: Connection,
    request_id: str,
    kind: str,
    model_id: str,
    seq_id: int,
    state: str,
    answer: bytes,
    device_seconds: float,
    used: dict[str, int] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> bool:
    """Write an operation's answer unless it has one; return whether it was written.

    With a `seq_id`, note that the model's operations up to it have had their turn. Of a pass or a step that
    was done, what it `used` is counted, and its `metrics` are kept.
    """
    now = time.time()
    if seq_id:
        advanced = {"executed_seq": seq_id, "last_request_at": now}
        connection.execute(_ADVANCE, advanced | {"key": model_id, "seq": seq_id})
    values = {
        "key": request_id,
        "state": state,
        "answer": answer,
        "answer_bytes": len(answer),
        "device_seconds": device_seconds,
        "finished_at": now,
    }
    if connection.execute(_FINISH, values).rowcount != 1:
        return False
    if kind == "forward":  # a replay does not need it
        drop_payload(connection, request_id)
    if used:
        row = accounts.NOTHING | used | {"model_id": model_id, "hour": int(now) // accounts.HOUR}
        connection.execute(accounts.ADD_OF_MODEL[connection.dialect.name], row)
    if metrics is not None:
        step = None if (made := metrics.get("optimizer_step")) is None else int(made)
        measured = {**metrics, "device_seconds:sum": device_seconds}
        add_metrics(connection, model_id, kind, seq_id, measured, step)
    return True


def add_metrics(
    connection: Connection,
    model_id: str,
    kind: str,
    number: int,
    metrics: Mapping[str, float],
    step: int | None = None,
) -> None:
    """Keep the metrics of one operation of the model. Non-finite values are left out."""
    finite = [(name[:_MOST_NAME], value) for name, value in metrics.items() if math.isfinite(value)]
    kept = dict(finite[:_MOST_METRICS])
    values = {
        "model_id": model_id,
        "kind": kind,
        "number": number,
        "step": step,
        "at": time.time(),
        "size": len(json.dumps(kept)) + _METRICS_BYTES,
        "metrics": kept,
    }
    connection.execute(_ADD_METRICS[connection.dialect.name], values)


def unfinished(connection: Connection) -> Sequence[Row]:
    """Return all operations that were accepted and not answered, oldest first."""
    return connection.execute(
        _with_sizes().where(operations.c.state == "accepted").order_by(operations.c.accepted_at)
    ).all()


def early_arrivals(connection: Connection, model_id: str, executed_seq: int) -> Sequence[Row]:
    """Return all operations of a model after `executed_seq`, in any state."""
    return connection.execute(
        _with_sizes()
        .where(operations.c.model_id == model_id, operations.c.seq_id > executed_seq)
        .order_by(operations.c.seq_id)
    ).all()


def last_seq(connection: Connection, model_id: str) -> int:
    query = select(func.max(operations.c.seq_id)).where(operations.c.model_id == model_id)
    return connection.execute(query).scalar() or 0


SAMPLE = "sample"


@dataclass(frozen=True)
class SampleNumber:
    """The number that a client gives to a sample of a sampling session. Sent again, it is the same sample."""

    session_id: str
    sampler_id: str
    number: int

    @property
    def natural_key(self) -> str:
        return f"sample/{self.sampler_id}/{self.number}"


def of_session(session_id: str) -> ColumnElement[bool]:
    """Match numbered samples of all sampling sessions of a session, including those that have ended."""
    return (operations.c.session_id == session_id) & (operations.c.kind == SAMPLE)


def _of_sampler(session_id: str, sampler_id: str) -> ColumnElement[bool]:
    return of_session(session_id) & (operations.c.sampler_id == sampler_id)


def unanswered(connection: Connection, session_id: str, sampler_id: str) -> Sequence[Row]:
    """Return the sampling session's numbered samples without an answer."""
    mine = _of_sampler(session_id, sampler_id)
    query = select(operations, payloads.c.size).outerjoin(
        payloads, payloads.c.operation_id == operations.c.id
    )
    return connection.execute(query.where(mine, operations.c.state == "accepted")).all()


def finished_since(connection: Connection, session_id: str, sampler_id: str, since: float) -> Sequence[Row]:
    """Return `id`, `state` and `sample_number` of the sampling session's answered samples, oldest first."""
    query = select(operations.c.id, operations.c.state, operations.c.sample_number)
    mine = _of_sampler(session_id, sampler_id)
    return connection.execute(
        query.where(mine, operations.c.finished_at >= since).order_by(operations.c.finished_at)
    ).all()


def timeline(connection: Connection, session_id: str, limit: int) -> Sequence[Row]:
    """Return the newest `limit` operations of the session's models and sampling sessions, oldest first."""
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


# --- uploaded losses

CUSTOM_LOSS = "create_custom_loss"


def custom_loss_key(session_id: str, seq_id: int) -> str:
    return f"custom_loss/{session_id}/{seq_id}"


def _losses_of(session_id: str) -> ColumnElement[bool]:
    return (operations.c.session_id == session_id) & (operations.c.kind == CUSTOM_LOSS)


def find_custom_loss(connection: Connection, natural_key: str) -> Row | None:
    """Return `owner` and `data` of a loss that was checked and whose session has not ended."""
    return connection.execute(
        select(operations.c.owner, payloads.c.data)
        .join(payloads, payloads.c.operation_id == operations.c.id)
        .where(
            operations.c.natural_key == natural_key,
            operations.c.kind == CUSTOM_LOSS,
            operations.c.state == "done",
        )
    ).first()


def stored_custom_losses(connection: Connection, session_id: str) -> tuple[int, int]:
    """Return how many losses the session has, and their bytes."""
    query = (
        select(func.count(), func.coalesce(func.sum(payloads.c.size), 0))
        .select_from(operations)
        .join(payloads, payloads.c.operation_id == operations.c.id)
        .where(_losses_of(session_id))
    )
    count, size = connection.execute(query).one()
    return count, size


def forget_custom_losses(connection: Connection, session_id: str) -> None:
    """Delete the losses of a session that ends, and give back the bytes charged for them."""
    count, size = stored_custom_losses(connection, session_id)
    charge(connection, session_id, -(size + count * ROW_BYTES))
    finished = select(operations.c.id).where(_losses_of(session_id), operations.c.state != "accepted")
    connection.execute(delete(payloads).where(payloads.c.operation_id.in_(finished)))
