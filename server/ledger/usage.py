"""Rows of usage: what operations used, by the hour, and what checkpoints take now."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, bindparam, delete, func, literal, select
from sqlalchemy.dialects import postgresql, sqlite

from .checkpoints import is_alive
from .schema import checkpoints, models, sessions, usage
from .session_rows import NO_PROJECT

HOUR = 3600
COUNTERS = ("trained", "prefilled", "prefilled_cached", "sampled", "checkpoints")
_KEY = ("owner", "hour", "session_id", "run_id", "base_model")


def _upsert(dialect: Any, source: Any) -> Any:
    """`source` yields one row: the key, then the counters, which are added to those there are."""
    statement = dialect.insert(usage).from_select([*_KEY, *COUNTERS], source)
    added = {name: usage.c[name] + statement.excluded[name] for name in COUNTERS}
    return statement.on_conflict_do_update(index_elements=_KEY, set_=added)


def _parameter(name: str) -> Any:
    return bindparam(name, type_=usage.c[name].type).label(name)


_counted = [_parameter(name) for name in COUNTERS]
# `WHERE true`: SQLite takes the conflict clause after a bare SELECT for a part of a join.
_of_ids = select(*(_parameter(name) for name in _KEY), *_counted).where(literal(1) == 1)
_of_model = select(
    models.c.owner, _parameter("hour"), models.c.session_id, models.c.id, models.c.base_model, *_counted
).where(models.c.id == bindparam("model_id"))
_DIALECTS = {"sqlite": sqlite, "postgresql": postgresql}
_ADD = {name: _upsert(dialect, _of_ids) for name, dialect in _DIALECTS.items()}
_ADD_OF_MODEL = {name: _upsert(dialect, _of_model) for name, dialect in _DIALECTS.items()}


def _row(counts: dict[str, int]) -> dict[str, Any]:
    return {"hour": int(time.time()) // HOUR} | dict.fromkeys(COUNTERS, 0) | counts


def add_of_model(connection: Connection, model_id: str, counts: dict[str, int]) -> None:
    """Used by an operation of the model, in this hour."""
    connection.execute(_ADD_OF_MODEL[connection.dialect.name], _row(counts) | {"model_id": model_id})


def add(
    connection: Connection,
    owner: str,
    session_id: str,
    run_id: str,
    base_model: str,
    counts: dict[str, int],
) -> None:
    """Used in this hour by what is not an operation of a model."""
    key = {"owner": owner, "session_id": session_id, "run_id": run_id, "base_model": base_model}
    connection.execute(_ADD[connection.dialect.name], _row(counts) | key)


def between(connection: Connection, owner: str, first: int, end: int) -> Sequence[Row]:
    """The owner's rows of the hours from `first` to before `end`, with what is known of their sessions."""
    query = (
        select(usage, sessions.c.project_id, sessions.c.user_metadata)
        .outerjoin(sessions, sessions.c.id == usage.c.session_id)
        .where(usage.c.owner == owner, usage.c.hour >= first, usage.c.hour < end)
    )
    return connection.execute(query.order_by(usage.c.hour)).all()


def stored(connection: Connection, owner: str, project_id: str | None) -> Sequence[Row]:
    """`project_id`, `number` and `size_bytes` of the owner's checkpoints, by their sessions' projects."""
    project = func.coalesce(sessions.c.project_id, NO_PROJECT).label("project_id")
    query = (
        select(project, func.count().label("number"), func.sum(checkpoints.c.size_bytes).label("size_bytes"))
        .join(models, models.c.id == checkpoints.c.run_id)
        .join(sessions, sessions.c.id == models.c.session_id)
        .where(checkpoints.c.owner == owner, is_alive())
        .group_by(project)
        .order_by(project)
    )
    if project_id is not None:
        query = query.where(project == project_id)
    return connection.execute(query).all()


def drop(connection: Connection, before: float) -> None:
    """Hours that ended before then."""
    connection.execute(delete(usage).where(usage.c.hour < int(before) // HOUR))
