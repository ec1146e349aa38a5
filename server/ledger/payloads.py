"""Rows of payloads: the messages of operations to the engine, kept while a replay may need them.

Small ones are in their row; of large ones the row says where in which file they are (segments.py). Rows are
written once and deleted a few at a time, so that no other change of the ledger waits long for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from sqlalchemy import Connection, Row, Select, delete, exists, func, insert, select, update

from .schema import models, operations, payloads

AT_A_TIME = 100  # rows in one change: of small payloads together less than a megabyte


@dataclass(frozen=True)
class Stored:
    """Where a payload is: `data` itself, or `size` bytes from `position` of a segment."""

    size: int
    data: bytes | None = None
    segment: str | None = None
    position: int | None = None
    checksum: int | None = None


def add(
    connection: Connection, operation_id: str, model_id: str | None, seq_id: int | None, stored: Stored
) -> None:
    key = {"operation_id": operation_id, "model_id": model_id, "seq_id": seq_id}
    connection.execute(insert(payloads).values(key | asdict(stored)))


def find(connection: Connection, operation_id: str) -> Stored | None:
    row = connection.execute(select(payloads).where(payloads.c.operation_id == operation_id)).first()
    return None if row is None else Stored(row.size, row.data, row.segment, row.position, row.checksum)


def replace(connection: Connection, operation_id: str, data: bytes) -> None:
    """By a small one."""
    values = asdict(Stored(len(data), data))
    connection.execute(update(payloads).where(payloads.c.operation_id == operation_id).values(values))


def drop(connection: Connection, operation_id: str) -> None:
    connection.execute(delete(payloads).where(payloads.c.operation_id == operation_id))


def to_replay(connection: Connection, model_id: str, after: int, through: int) -> Sequence[Row]:
    """`operation_id` and `size` of what brings a model from the state after operation `after` to that after
    `through`, in order."""
    query = select(payloads.c.operation_id, payloads.c.size).where(
        payloads.c.model_id == model_id, payloads.c.seq_id > after, payloads.c.seq_id <= through
    )
    return connection.execute(query.order_by(payloads.c.seq_id)).all()


def _forget(connection: Connection, of: Select) -> bool:
    """Of answered operations, some of them; whether there may be more."""
    unanswered = exists().where(operations.c.id == payloads.c.operation_id, operations.c.state == "accepted")
    some = of.where(~unanswered).limit(AT_A_TIME)
    dropped = connection.execute(delete(payloads).where(payloads.c.operation_id.in_(some)))
    return dropped.rowcount == AT_A_TIME


def forget(connection: Connection, model_id: str, through: int) -> bool:
    """No replay will need the model's payloads up to that any more. Whether there may be more to forget."""
    mine = (payloads.c.model_id == model_id) & (payloads.c.seq_id <= through)
    return _forget(connection, select(payloads.c.operation_id).where(mine))


def forget_ended_models(connection: Connection) -> bool:
    """Nobody will bring these back. Whether there may be more to forget."""
    ended = select(models.c.id).where(models.c.state.in_(("finished", "failed")))
    return _forget(connection, select(payloads.c.operation_id).where(payloads.c.model_id.in_(ended)))


def segments(connection: Connection) -> set[str]:
    """Those that a row points into."""
    query = select(payloads.c.segment).where(payloads.c.segment.is_not(None)).distinct()
    return {name for name in connection.execute(query).scalars() if name is not None}


def any_in_operations(connection: Connection) -> bool:
    """Whether rows of operations still hold payloads, as in ledgers from before the first release."""
    query = select(operations.c.id).where(operations.c.payload.is_not(None)).limit(1)
    return connection.execute(query).first() is not None


def in_operations(connection: Connection, after: str, max_bytes: int) -> Sequence[Row]:
    """The next operations after that id that still have their payloads themselves: some, of so many bytes."""
    query = (
        select(operations.c.id, func.length(operations.c.payload).label("size"))
        .where(operations.c.payload.is_not(None), operations.c.id > after)
        .order_by(operations.c.id)
        .limit(AT_A_TIME)
    )
    chosen: list[str] = []
    for row in connection.execute(query):
        if chosen and max_bytes < row.size:
            break
        chosen.append(row.id)
        max_bytes -= row.size
    wanted = select(
        operations.c.id, operations.c.model_id, operations.c.seq_id, operations.c.kind, operations.c.payload
    )
    return connection.execute(wanted.where(operations.c.id.in_(chosen)).order_by(operations.c.id)).all()


def move(connection: Connection, row: Row, stored: Stored) -> None:
    """From its operation's row, unless it was moved before."""
    if find(connection, row.id) is None:
        add(connection, row.id, row.model_id, row.seq_id, stored)
    connection.execute(update(operations).where(operations.c.id == row.id).values(payload=None))
