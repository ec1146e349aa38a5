"""Rows of the server's own training in environments: where each run stands, and what each step was like."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, insert, select, update

from .schema import models, rlve_runs, rlve_steps

ACTIVE = ("running", "stopping")


def add(connection: Connection, model_id: str, difficulties: dict[str, Any]) -> None:
    connection.execute(
        insert(rlve_runs).values(
            model_id=model_id,
            state="running",
            step=0,
            attempt=0,
            difficulties=difficulties,
            updated_at=time.time(),
        )
    )


def find(connection: Connection, model_id: str) -> Row | None:
    return connection.execute(select(rlve_runs).where(rlve_runs.c.model_id == model_id)).first()


def active(connection: Connection) -> Sequence[Row]:
    """`owner` and `id` of the models that are to be trained on."""
    query = select(models.c.owner, models.c.id).join(rlve_runs, rlve_runs.c.model_id == models.c.id)
    alive = models.c.state.in_(("creating", "ready"))
    return connection.execute(query.where(alive, rlve_runs.c.state.in_(ACTIVE))).all()


def change(connection: Connection, model_id: str, **values: Any) -> None:
    connection.execute(
        update(rlve_runs).where(rlve_runs.c.model_id == model_id).values(updated_at=time.time(), **values)
    )


def add_step(
    connection: Connection, model_id: str, step: int, difficulties: dict[str, Any], metrics: dict[str, Any]
) -> None:
    """The run's newest."""
    change(connection, model_id, step=step, attempt=0, difficulties=difficulties)
    connection.execute(insert(rlve_steps).values(model_id=model_id, step=step, metrics=metrics))


def set_metrics(connection: Connection, model_id: str, step: int, metrics: dict[str, Any]) -> None:
    of = (rlve_steps.c.model_id == model_id) & (rlve_steps.c.step == step)
    connection.execute(update(rlve_steps).where(of).values(metrics=metrics))


def newest_steps(connection: Connection, model_id: str, count: int) -> list[dict[str, Any]]:
    """The metrics of so many, oldest first."""
    query = select(rlve_steps.c.metrics).where(rlve_steps.c.model_id == model_id)
    newest = connection.execute(query.order_by(rlve_steps.c.step.desc()).limit(count)).scalars().all()
    return list(reversed(newest))
