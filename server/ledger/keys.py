"""Rows of API keys. What is kept of a key is its SHA-256: it is 256 random bits, which nobody guesses."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

from sqlalchemy import Connection, Row, create_engine, insert, inspect, make_url, select, update
from sqlalchemy.exc import SQLAlchemyError

from . import audit
from .faults import LedgerUnusable, no_driver, why_unusable
from .schema import api_keys
from .tenancy import ensure_tenant


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def create(connection: Connection, tenant: str, note: str | None) -> tuple[str, str]:
    """A new key of the tenant, and the id by which it is listed and revoked. The key is nowhere else."""
    ensure_tenant(connection, tenant)
    key, identifier = f"tml-{secrets.token_urlsafe(32)}", secrets.token_hex(4)
    connection.execute(
        insert(api_keys).values(
            id=identifier, tenant=tenant, digest=digest(key), note=note, created_at=time.time()
        )
    )
    audit.record(connection, tenant, "api_key_created", key_id=identifier, note=note)
    return key, identifier


def all_keys(connection: Connection) -> Sequence[Row]:
    """Revoked ones too, oldest first."""
    return connection.execute(select(api_keys).order_by(api_keys.c.created_at)).all()


def revoke(connection: Connection, identifier: str) -> bool:
    """Whether there is such a key. One that was revoked before stays so."""
    row = connection.execute(select(api_keys).where(api_keys.c.id == identifier)).first()
    if row is None:
        return False
    if row.revoked_at is None:
        of_id = api_keys.c.id == identifier
        connection.execute(update(api_keys).where(of_id).values(revoked_at=time.time()))
        audit.record(connection, row.tenant, "api_key_revoked", key_id=identifier, note=row.note)
    return True


def any_in(url: str) -> bool:
    """Whether the database at `url` has keys. It is not made or migrated for that."""
    location = make_url(url)
    if location.get_backend_name() == "sqlite" and not Path(location.database or "").is_file():
        return False
    try:
        engine = create_engine(location)
    except ImportError as error:
        raise LedgerUnusable(no_driver(error)) from error
    try:
        with engine.connect() as connection:
            if not inspect(connection).has_table(api_keys.name):
                return False
            return connection.execute(select(api_keys.c.id).limit(1)).first() is not None
    except SQLAlchemyError as error:
        raise LedgerUnusable(why_unusable(engine, error)) from error
    finally:
        engine.dispose()
