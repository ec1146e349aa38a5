"""Rows of step metrics: the metrics of each training operation, kept for curves.

A run keeps at most about `MOST_ROWS` rows and `MOST_BYTES` bytes: all of its newest rows, half of those
before them, a quarter of twice as many before these, and so on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import Connection, Row, delete, func, or_, select

from .operations import add_metrics
from .schema import models, step_metrics

MOST_ROWS = 2048
MOST_BYTES = 1 << 20
THIN_EVERY = 256
"""`thin` is called after so many operations of a model."""
_LARGEST_ROW = 16_384  # bytes, at most
_REPORTED = "reported"
_BLOCK = 16
_NEWEST = 8  # rows of each kind


def report(connection: Connection, model_id: str, step: int, metrics: Mapping[str, float]) -> None:
    """Add metrics of a step that come from outside the engine. The newest value of a name counts."""
    of_step = (
        (step_metrics.c.model_id == model_id)
        & (step_metrics.c.kind == _REPORTED)
        & (step_metrics.c.number == step)
    )
    earlier = connection.execute(select(step_metrics.c.metrics).where(of_step)).scalar() or {}
    connection.execute(delete(step_metrics).where(of_step))
    kept = {name: value for name, value in earlier.items() if name not in metrics}
    add_metrics(connection, model_id, _REPORTED, step, dict(metrics) | kept, step)
    thin(connection, model_id)


def since(connection: Connection, model_id: str, number: int, reported_at: float) -> Sequence[Row]:
    """Return rows of operations after `number`, and those reported after `reported_at`, in order of time."""
    is_reported = step_metrics.c.kind == _REPORTED
    newer = (~is_reported & (step_metrics.c.number > number)) | (
        is_reported & (step_metrics.c.at > reported_at)
    )
    query = select(step_metrics).where(step_metrics.c.model_id == model_id, newer)
    return connection.execute(query.order_by(step_metrics.c.at, step_metrics.c.number)).all()


def newest(connection: Connection, model_ids: Sequence[str]) -> Sequence[Row]:
    """Return the last few rows of each model up to its newest step (or pass, if it has no step)."""
    other = step_metrics.alias()
    last = (
        select(func.max(other.c.number))
        .where(other.c.model_id == step_metrics.c.model_id, other.c.kind == step_metrics.c.kind)
        .scalar_subquery()
    )
    query = select(step_metrics).where(
        step_metrics.c.model_id.in_(model_ids),
        step_metrics.c.number > last - _NEWEST,
        (step_metrics.c.kind != _REPORTED) | (step_metrics.c.number == last),
    )
    return connection.execute(query.order_by(step_metrics.c.at, step_metrics.c.number)).all()


# --- bounds


def thin(connection: Connection, model_id: str, most_rows: int = MOST_ROWS) -> None:
    """Drop rows of the model, the more the older they are, until the rest is within the bounds."""

    def is_within() -> bool:
        count, size = _extent(connection, model_id)
        return count <= most_rows and size <= MOST_BYTES

    whole = max(1, most_rows // 4)
    while whole and not is_within():
        _thin(connection, model_id, whole)
        whole //= 2
    if not is_within():  # a client's own numbers may all be kept by thinning: keep its newest reports
        of_model = step_metrics.c.model_id == model_id
        newest = select(step_metrics.c.at).where(of_model).order_by(step_metrics.c.at.desc())
        last_kept = newest.offset(max(0, min(most_rows, MOST_BYTES // _LARGEST_ROW) // 2)).limit(1)
        connection.execute(
            delete(step_metrics).where(of_model, step_metrics.c.at <= last_kept.scalar_subquery())
        )


def _thin(connection: Connection, model_id: str, whole: int) -> None:
    """Drop rows by age, for each kind of row.

    The newest `whole` numbers stay, half of the `whole` before them, a quarter of the `2 * whole` before
    those, and so on.
    """
    of_model = step_metrics.c.model_id == model_id
    newest_of_kind = (
        select(step_metrics.c.kind, func.max(step_metrics.c.number))
        .where(of_model)
        .group_by(step_metrics.c.kind)
    )
    # Consecutive numbers stay together: a step, and the passes before it.
    block = (step_metrics.c.number - 1) // _BLOCK % (1 << 31)
    scattered = block * 2654435761 // (1 << 16)
    for kind, last in connection.execute(newest_of_kind).all():
        levels = range(1, 1 + (last // whole).bit_length())
        is_dropped = [
            (step_metrics.c.number <= last - (whole << (level - 1))) & (scattered % (1 << level) != 0)
            for level in levels
        ]
        if is_dropped:
            connection.execute(
                delete(step_metrics).where(of_model, step_metrics.c.kind == kind, or_(*is_dropped))
            )


def _extent(connection: Connection, model_id: str) -> tuple[int, int]:
    query = select(func.count(), func.coalesce(func.sum(step_metrics.c.size), 0))
    count, size = connection.execute(query.where(step_metrics.c.model_id == model_id)).one()
    return count, size


def crowded(connection: Connection, most_bytes: int) -> list[str]:
    """Return the owners whose runs' metrics take more than `most_bytes`."""
    query = (
        select(models.c.owner)
        .join(step_metrics, step_metrics.c.model_id == models.c.id)
        .group_by(models.c.owner)
        .having(func.sum(step_metrics.c.size) > most_bytes)
    )
    return list(connection.execute(query).scalars())


def thin_owner(connection: Connection, owner: str, most_bytes: int) -> bool:
    """Halve the largest run of an owner with more than `most_bytes`; return whether to call this again."""
    size = func.sum(step_metrics.c.size).label("size")
    sizes = (
        select(step_metrics.c.model_id, size)
        .join(models, models.c.id == step_metrics.c.model_id)
        .where(models.c.owner == owner)
        .group_by(step_metrics.c.model_id)
        .order_by(size.desc())
    )
    found = connection.execute(sizes).all()
    if sum(row.size for row in found) <= most_bytes:
        return False
    largest = found[0].model_id
    count, _ = _extent(connection, largest)
    thin(connection, largest, count // 2)
    if _extent(connection, largest)[0] == count:  # few rows per run: the least recently used runs lose theirs
        oldest = select(models.c.id).where(models.c.owner == owner).order_by(models.c.last_request_at)
        chosen = oldest.where(models.c.id.in_([row.model_id for row in found])).limit(max(1, len(found) // 2))
        connection.execute(delete(step_metrics).where(step_metrics.c.model_id.in_(chosen)))
    return True


def resting(connection: Connection, before: float, most_rows: int, limit: int) -> list[str]:
    """Return up to `limit` models that have over `most_rows` rows, none of them newer than `before`."""
    query = (
        select(step_metrics.c.model_id)
        .group_by(step_metrics.c.model_id)
        .having(func.max(step_metrics.c.at) < before, func.count() > most_rows)
    )
    return list(connection.execute(query.limit(limit)).scalars())
