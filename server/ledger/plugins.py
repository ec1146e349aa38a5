"""Rows of plugins: tenants' SGLang servers, and the training that the server runs itself (RLVE)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, delete, insert, null, select, update

from .schema import inference_endpoints, models, rlve_runs, rlve_steps, tenants


def endpoints(connection: Connection, owner: str) -> Sequence[Row]:
    query = select(inference_endpoints).where(inference_endpoints.c.owner == owner)
    return connection.execute(query.order_by(inference_endpoints.c.created_at)).all()


def all_endpoints(connection: Connection) -> Sequence[Row]:
    """Return the SGLang servers of all tenants."""
    return connection.execute(select(inference_endpoints)).all()


def add_endpoint(
    connection: Connection, owner: str, host: str, port: int, fields: dict[str, Any], limit: int
) -> bool:
    """Add a tenant's server unless it is there or there are `limit` others; return whether it was added."""
    known = endpoints(connection, owner)
    if len(known) >= limit or any((row.host, row.port) == (host, port) for row in known):
        return False
    values = {"owner": owner, "host": host, "port": port, "fields": fields, "created_at": time.time()}
    connection.execute(insert(inference_endpoints).values(values))
    return True


def replace_endpoint_secret(
    connection: Connection, owner: str, host: str, port: int, fields: dict[str, Any]
) -> None:
    """Replace the fields, and overwrite the old ones on disk because they contain a secret."""
    is_sqlite = connection.dialect.name == "sqlite"
    before = connection.exec_driver_sql("PRAGMA secure_delete").scalar() if is_sqlite else None
    if is_sqlite:
        connection.exec_driver_sql("PRAGMA secure_delete=ON")
    here = inference_endpoints.c.host == host, inference_endpoints.c.port == port
    mine = inference_endpoints.c.owner == owner
    connection.execute(update(inference_endpoints).where(mine, *here).values(fields=fields))
    if is_sqlite:
        connection.exec_driver_sql(f"PRAGMA secure_delete={before}")


def remove_endpoint(connection: Connection, owner: str, host: str, port: int) -> bool:
    """Remove a tenant's server; return whether it was there."""
    mine = inference_endpoints.c.owner == owner
    this = (inference_endpoints.c.host == host) & (inference_endpoints.c.port == port)
    return connection.execute(delete(inference_endpoints).where(mine, this)).rowcount == 1


def set_quantization(connection: Connection, owner: str, quantization: dict[str, Any] | None) -> None:
    values = {"sync_quantization": null() if quantization is None else quantization}
    connection.execute(update(tenants).where(tenants.c.id == owner).values(values))


def quantization(connection: Connection, owner: str) -> dict[str, Any] | None:
    return connection.execute(select(tenants.c.sync_quantization).where(tenants.c.id == owner)).scalar()


# --- training in environments

ACTIVE_STATES = ("running", "stopping")


def add_run(connection: Connection, model_id: str, difficulties: dict[str, Any]) -> None:
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


def find_run(connection: Connection, model_id: str) -> Row | None:
    return connection.execute(select(rlve_runs).where(rlve_runs.c.model_id == model_id)).first()


def active_runs(connection: Connection) -> Sequence[Row]:
    """Return `owner` and `id` of the models that the server is training."""
    query = select(models.c.owner, models.c.id).join(rlve_runs, rlve_runs.c.model_id == models.c.id)
    alive = models.c.state.in_(("creating", "ready"))
    return connection.execute(query.where(alive, rlve_runs.c.state.in_(ACTIVE_STATES))).all()


def change_run(connection: Connection, model_id: str, **values: Any) -> None:
    connection.execute(
        update(rlve_runs).where(rlve_runs.c.model_id == model_id).values(updated_at=time.time(), **values)
    )


def add_step(
    connection: Connection, model_id: str, step: int, difficulties: dict[str, Any], metrics: dict[str, Any]
) -> None:
    """Record the run's next step."""
    change_run(connection, model_id, step=step, attempt=0, difficulties=difficulties)
    connection.execute(insert(rlve_steps).values(model_id=model_id, step=step, metrics=metrics))


def set_step_metrics(connection: Connection, model_id: str, step: int, metrics: dict[str, Any]) -> None:
    of = (rlve_steps.c.model_id == model_id) & (rlve_steps.c.step == step)
    connection.execute(update(rlve_steps).where(of).values(metrics=metrics))


def newest_steps(connection: Connection, model_id: str, count: int) -> list[dict[str, Any]]:
    """Return the metrics of the newest `count` steps, oldest first."""
    query = select(rlve_steps.c.metrics).where(rlve_steps.c.model_id == model_id)
    newest = connection.execute(query.order_by(rlve_steps.c.step.desc()).limit(count)).scalars().all()
    return list(reversed(newest))
