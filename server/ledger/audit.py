"""Rows of the audit log, written in the transaction of the change that they speak of."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, delete, func, insert, select

from .schema import audit

_AT_A_TIME = 1000  # rows in one change: other writers wait for it


def record(connection: Connection, owner: str, event: str, **details: Any) -> None:
    """`event`: the resource, an underscore, and what was done to it, in the past tense."""
    connection.execute(insert(audit).values(owner=owner, at=time.time(), event=event, details=details))


def between(
    connection: Connection, owner: str, start: float, end: float, resource: str | None, limit: int
) -> Sequence[Row]:
    """The newest `limit` of the owner's entries in [start, end), oldest first; of one resource or of all."""
    query = select(audit).where(audit.c.owner == owner, audit.c.at >= start, audit.c.at < end)
    if resource is not None:
        query = query.where(audit.c.event.startswith(f"{resource}_", autoescape=True))
    newest = query.order_by(audit.c.at.desc(), audit.c.id.desc()).limit(limit)
    return connection.execute(newest).all()[::-1]


def drop(connection: Connection, before: float) -> bool:
    """Entries older than that, some of them; whether there may be more."""
    old = select(audit.c.id).where(audit.c.at < before).limit(_AT_A_TIME)
    return connection.execute(delete(audit).where(audit.c.id.in_(old))).rowcount == _AT_A_TIME


def crowded(connection: Connection, most: int) -> Sequence[str]:
    """The owners of more than that many entries."""
    query = select(audit.c.owner).group_by(audit.c.owner).having(func.count() > most)
    return connection.execute(query).scalars().all()


def drop_oldest(connection: Connection, owner: str, most: int) -> bool:
    """The owner's entries beyond the newest so many, some of them; whether there may be more."""
    mine = audit.c.owner == owner
    newest = select(audit.c.at).where(mine).order_by(audit.c.at.desc()).offset(most).limit(1)
    last = connection.execute(newest).scalar()
    if last is None:
        return False
    old = select(audit.c.id).where(mine, audit.c.at <= last).limit(_AT_A_TIME)
    return connection.execute(delete(audit).where(audit.c.id.in_(old))).rowcount == _AT_A_TIME
