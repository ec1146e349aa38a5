"""Rows of API keys, of hourly usage, and of the audit log.

The ledger has only the SHA-256 of a key. An entry of the audit log is written in the transaction of the
change that it describes.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, bindparam, delete, func, insert, inspect, literal, select, update
from sqlalchemy.dialects import postgresql, sqlite

from .ownership import connected
from .schema import api_keys, models, sessions, usage
from .schema import audit as audit_log
from .tenancy import ensure_tenant


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def create_key(connection: Connection, tenant: str, note: str | None) -> tuple[str, str]:
    """Create a key of the tenant. Return it, and the id that lists and revokes it. The key is not stored."""
    ensure_tenant(connection, tenant)
    key, identifier = f"tml-{secrets.token_urlsafe(32)}", secrets.token_hex(4)
    connection.execute(
        insert(api_keys).values(
            id=identifier, tenant=tenant, digest=digest(key), note=note, created_at=time.time()
        )
    )
    audit(connection, tenant, "api_key_created", key_id=identifier, note=note)
    return key, identifier


def all_keys(connection: Connection) -> Sequence[Row]:
    """Return all keys, including revoked ones, oldest first."""
    return connection.execute(select(api_keys).order_by(api_keys.c.created_at)).all()


def revoke_key(connection: Connection, identifier: str) -> bool:
    """Revoke a key; return whether it exists. A key that was revoked before keeps its time."""
    row = connection.execute(select(api_keys).where(api_keys.c.id == identifier)).first()
    if row is None:
        return False
    if row.revoked_at is None:
        of_id = api_keys.c.id == identifier
        connection.execute(update(api_keys).where(of_id).values(revoked_at=time.time()))
        audit(connection, row.tenant, "api_key_revoked", key_id=identifier, note=row.note)
    return True


def has_keys(url: str) -> bool:
    """Return whether the database at `url` has keys, without creating or migrating it."""
    with connected(url) as connection:
        if connection is None or not inspect(connection).has_table(api_keys.name):
            return False
        return connection.execute(select(api_keys.c.id).limit(1)).first() is not None


# --- usage

HOUR = 3600
COUNTERS = ("trained", "prefilled", "prefilled_cached", "sampled", "checkpoints")
NOTHING: dict[str, Any] = dict.fromkeys(COUNTERS, 0)
_KEY = ("owner", "hour", "session_id", "run_id", "base_model")


def _upsert(dialect: Any, source: Any) -> Any:
    """Build an insert of the row that `source` yields, which adds its counters to an existing row."""
    statement = dialect.insert(usage).from_select([*_KEY, *COUNTERS], source)
    added = {name: usage.c[name] + statement.excluded[name] for name in COUNTERS}
    return statement.on_conflict_do_update(index_elements=_KEY, set_=added)


def _parameter(name: str) -> Any:
    return bindparam(name, type_=usage.c[name].type).label(name)


_counted = [_parameter(name) for name in COUNTERS]
# With `WHERE true`: after a bare SELECT, SQLite reads the conflict clause as part of a join.
_of_ids = select(*(_parameter(name) for name in _KEY), *_counted).where(literal(1) == 1)
_of_model = select(
    models.c.owner, _parameter("hour"), models.c.session_id, models.c.id, models.c.base_model, *_counted
).where(models.c.id == bindparam("model_id"))
_DIALECTS = {"sqlite": sqlite, "postgresql": postgresql}
_ADD = {name: _upsert(dialect, _of_ids) for name, dialect in _DIALECTS.items()}
ADD_OF_MODEL = {name: _upsert(dialect, _of_model) for name, dialect in _DIALECTS.items()}


def add_model_usage(connection: Connection, model_id: str, counts: dict[str, int]) -> None:
    """Count what an operation of the model used in this hour."""
    row = NOTHING | counts | {"model_id": model_id, "hour": int(time.time()) // HOUR}
    connection.execute(ADD_OF_MODEL[connection.dialect.name], row)


def add_usage(
    connection: Connection, owner: str, session_id: str, run_id: str, base_model: str, counts: dict[str, int]
) -> None:
    """Count what was used in this hour by an operation without a model."""
    key = {"owner": owner, "session_id": session_id, "run_id": run_id, "base_model": base_model}
    row = NOTHING | counts | key | {"hour": int(time.time()) // HOUR}
    connection.execute(_ADD[connection.dialect.name], row)


def usage_between(connection: Connection, owner: str, first: int, end: int) -> Sequence[Row]:
    """Return the owner's rows of the hours in [`first`, `end`), with what is known of their sessions."""
    query = (
        select(usage, sessions.c.project_id, sessions.c.user_metadata)
        .outerjoin(sessions, sessions.c.id == usage.c.session_id)
        .where(usage.c.owner == owner, usage.c.hour >= first, usage.c.hour < end)
    )
    return connection.execute(query.order_by(usage.c.hour)).all()


def tenants_usage(connection: Connection, since: float) -> Sequence[Row]:
    """Return what each tenant has used from the hour of `since` on: `owner`, and the sum of each counter."""
    sums = [func.sum(usage.c[name]).label(name) for name in COUNTERS]
    query = select(usage.c.owner, *sums).where(usage.c.hour >= int(since) // HOUR)
    return connection.execute(query.group_by(usage.c.owner).order_by(usage.c.owner)).all()


def drop_usage(connection: Connection, before: float) -> None:
    """Delete the hours that ended before that time."""
    connection.execute(delete(usage).where(usage.c.hour < int(before) // HOUR))


# --- the audit log

_AT_A_TIME = 1000  # rows deleted in one change, which other writers wait for


def audit(connection: Connection, owner: str, event: str, **details: Any) -> None:
    """Add an entry to the audit log. `event`: the resource, an underscore, and a verb in the past tense."""
    connection.execute(insert(audit_log).values(owner=owner, at=time.time(), event=event, details=details))


def audit_entries(
    connection: Connection, owner: str, start: float, end: float, resource: str | None, limit: int
) -> Sequence[Row]:
    """Return the newest `limit` entries of the owner in [start, end), oldest first, of one resource or
    all."""
    query = select(audit_log).where(audit_log.c.owner == owner, audit_log.c.at >= start, audit_log.c.at < end)
    if resource is not None:
        query = query.where(audit_log.c.event.startswith(f"{resource}_", autoescape=True))
    newest = query.order_by(audit_log.c.at.desc(), audit_log.c.id.desc()).limit(limit)
    return connection.execute(newest).all()[::-1]


def drop_audit_entries(connection: Connection, before: float) -> bool:
    """Delete some of the entries before that time; return whether there may be more."""
    old = select(audit_log.c.id).where(audit_log.c.at < before).limit(_AT_A_TIME)
    return connection.execute(delete(audit_log).where(audit_log.c.id.in_(old))).rowcount == _AT_A_TIME


def owners_of_long_audit_logs(connection: Connection, most: int) -> Sequence[str]:
    """Return the owners with more than that many entries."""
    query = select(audit_log.c.owner).group_by(audit_log.c.owner).having(func.count() > most)
    return connection.execute(query).scalars().all()


def drop_oldest_audit_entries(connection: Connection, owner: str, most: int) -> bool:
    """Delete some of the owner's entries beyond its newest `most`; return whether there may be more."""
    mine = audit_log.c.owner == owner
    newest = select(audit_log.c.at).where(mine).order_by(audit_log.c.at.desc()).offset(most).limit(1)
    last = connection.execute(newest).scalar()
    if last is None:
        return False
    old = select(audit_log.c.id).where(mine, audit_log.c.at <= last).limit(_AT_A_TIME)
    return connection.execute(delete(audit_log).where(audit_log.c.id.in_(old))).rowcount == _AT_A_TIME
