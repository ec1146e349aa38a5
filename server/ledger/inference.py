"""Rows of inference servers: those that a tenant has named, and how weights are quantized for them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, delete, insert, null, select, update

from .schema import inference_endpoints, tenants


def endpoints(connection: Connection, owner: str) -> Sequence[Row]:
    query = select(inference_endpoints).where(inference_endpoints.c.owner == owner)
    return connection.execute(query.order_by(inference_endpoints.c.created_at)).all()


def all_endpoints(connection: Connection) -> Sequence[Row]:
    """Of all tenants."""
    return connection.execute(select(inference_endpoints)).all()


def add(connection: Connection, owner: str, host: str, port: int, fields: dict[str, Any], limit: int) -> bool:
    """Whether it was not there, and there was room."""
    known = endpoints(connection, owner)
    if len(known) >= limit or any((row.host, row.port) == (host, port) for row in known):
        return False
    values = {"owner": owner, "host": host, "port": port, "fields": fields, "created_at": time.time()}
    connection.execute(insert(inference_endpoints).values(values))
    return True


def replace_secret(connection: Connection, owner: str, host: str, port: int, fields: dict[str, Any]) -> None:
    """Writes other fields, and overwrites what was there: it had a secret in it."""
    is_sqlite = connection.dialect.name == "sqlite"
    before = connection.exec_driver_sql("PRAGMA secure_delete").scalar() if is_sqlite else None
    if is_sqlite:
        connection.exec_driver_sql("PRAGMA secure_delete=ON")
    here = inference_endpoints.c.host == host, inference_endpoints.c.port == port
    mine = inference_endpoints.c.owner == owner
    connection.execute(update(inference_endpoints).where(mine, *here).values(fields=fields))
    if is_sqlite:
        connection.exec_driver_sql(f"PRAGMA secure_delete={before}")


def remove(connection: Connection, owner: str, host: str, port: int) -> bool:
    """Whether it was there."""
    mine = inference_endpoints.c.owner == owner
    this = (inference_endpoints.c.host == host) & (inference_endpoints.c.port == port)
    return connection.execute(delete(inference_endpoints).where(mine, this)).rowcount == 1


def set_quantization(connection: Connection, owner: str, quantization: dict[str, Any] | None) -> None:
    values = {"sync_quantization": null() if quantization is None else quantization}
    connection.execute(update(tenants).where(tenants.c.id == owner).values(values))


def quantization(connection: Connection, owner: str) -> dict[str, Any] | None:
    return connection.execute(select(tenants.c.sync_quantization).where(tenants.c.id == owner)).scalar()
