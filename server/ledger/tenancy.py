"""Rows of tenants, and of the sessions, models and samplers that they own.

A session's row has the size of all its rows, including those of its models and samplers. A tenant's sessions
have a quota of bytes. When it is used up, the oldest sessions that have finished, or were silent for a week,
are emptied before anything is refused.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    ScalarSelect,
    Select,
    case,
    delete,
    false,
    func,
    insert,
    null,
    or_,
    select,
    update,
)

from ..errors import QuotaExceeded
from .schema import base_models, checkpoints, models, samplers, sessions, tenants


def model_id(session_id: str, model_seq_id: int) -> str:
    """Return the id of a model, which clients compute too."""
    return f"{session_id}:train:{model_seq_id}"


def ensure_tenant(connection: Connection, tenant: str) -> None:
    if connection.execute(select(tenants.c.id).where(tenants.c.id == tenant)).first() is None:
        connection.execute(insert(tenants).values(id=tenant, created_at=time.time()))


def quotas(connection: Connection) -> dict[str, dict[str, float]]:
    """Return the quotas of tenants that have their own."""
    rows = connection.execute(select(tenants.c.id, tenants.c.quota).where(tenants.c.quota.is_not(None)))
    return {row.id: row.quota for row in rows}


def set_quota(connection: Connection, tenant: str, quota: dict[str, float] | None) -> None:
    """Set a tenant's quota; None: the default."""
    ensure_tenant(connection, tenant)
    values = {"quota": null() if quota is None else quota}
    connection.execute(update(tenants).where(tenants.c.id == tenant).values(values))


def add_session(connection: Connection, **values: Any) -> None:
    now = time.time()
    size = size_of(*values.values())
    connection.execute(
        insert(sessions).values(created_at=now, last_heartbeat_at=now, size_bytes=size, **values)
    )


def find_session(connection: Connection, session_id: str) -> Row | None:
    return connection.execute(select(sessions).where(sessions.c.id == session_id)).first()


SAMPLING_ENGINE = "tinsmith_sampling_engine"
"""The key, in a session's metadata, of the default sampling engine of its sampling sessions."""


def sampling_engine_of_session(connection: Connection, session_id: str) -> str | None:
    found = select(sessions.c.user_metadata).where(sessions.c.id == session_id)
    return (connection.execute(found).scalar() or {}).get(SAMPLING_ENGINE)


def list_sessions(connection: Connection, owner: str, limit: int, offset: int) -> Sequence[Row]:
    query = select(sessions).where(sessions.c.owner == owner).order_by(sessions.c.created_at.desc())
    return connection.execute(query.limit(limit).offset(offset)).all()


def heartbeat(connection: Connection, session_id: str, at: float) -> None:
    connection.execute(update(sessions).where(sessions.c.id == session_id).values(last_heartbeat_at=at))


def finish_session(connection: Connection, session_id: str, reason: str, detail: str | None) -> bool:
    """Finish a session; return whether it had not finished before."""
    finished = connection.execute(
        update(sessions)
        .where(sessions.c.id == session_id, sessions.c.finished_at.is_(None))
        .values(finished_at=time.time(), finish_reason=reason, finish_detail=detail)
    )
    return finished.rowcount == 1


def add_model(connection: Connection, **values: Any) -> None:
    now = time.time()
    made = {"created_at": now, "last_request_at": now, "executed_seq": 0, "snapshot_seq": 0}
    base = {"base_digest": digest_of(values["base_model"])}
    connection.execute(insert(models).values(made | base | values))
    charge(connection, values["session_id"], size_of_model(values))


def find_model(connection: Connection, model_id: str) -> Row | None:
    return connection.execute(select(models).where(models.c.id == model_id)).first()


def models_by_id(connection: Connection, ids: set[str]) -> dict[str, Row]:
    rows = connection.execute(select(models).where(models.c.id.in_(ids))).all()
    return {row.id: row for row in rows}


def find_owned(connection: Connection, owner: str, name: str) -> Row | None:
    """Return the owner's model of that id, or its newest with that alias."""
    named = (models.c.owner == owner) & ((models.c.id == name) | (models.c.alias == name))
    order = ((models.c.id == name).desc(), models.c.created_at.desc())
    return connection.execute(select(models).where(named).order_by(*order).limit(1)).first()


def update_model(connection: Connection, model_id: str, **values: Any) -> None:
    connection.execute(update(models).where(models.c.id == model_id).values(**values))


def settle_creation(connection: Connection, model_id: str, state: str) -> None:
    """Record that a model was created, or could not be, unless its session has ended meanwhile."""
    created = update(models).where(models.c.id == model_id, models.c.state == "creating")
    connection.execute(created.values(state=state))


def models_of_session(connection: Connection, session_id: str) -> Sequence[Row]:
    query = select(models).where(models.c.session_id == session_id).order_by(models.c.created_at)
    return connection.execute(query).all()


def list_models(
    connection: Connection, of: ColumnElement[bool], limit: int, offset: int
) -> tuple[Sequence[Row], int]:
    """Return a page of the training runs among `of`, last used first, and their total number."""
    query = select(models).where(of).order_by(models.c.last_request_at.desc()).limit(limit).offset(offset)
    return connection.execute(query).all(), connection.execute(select(func.count()).where(of)).scalar() or 0


def active_models(connection: Connection, owner: str, limit: int = 1000) -> Sequence[Row]:
    """Return the owner's models that have not ended, last used first."""
    mine = (models.c.owner == owner) & models.c.state.in_(("creating", "ready"))
    query = select(models).where(mine).order_by(models.c.last_request_at.desc())
    return connection.execute(query.limit(limit)).all()


def models_of(owner: str) -> ColumnElement[bool]:
    return models.c.owner == owner


def models_among(run_ids: Select) -> ColumnElement[bool]:
    return models.c.id.in_(run_ids)


def models_of_project(project_id: str) -> ColumnElement[bool]:
    return models.c.session_id.in_(select(sessions.c.id).where(sessions.c.project_id == project_id))


def assign_project(connection: Connection, session_id: str, project_id: str) -> None:
    connection.execute(update(sessions).where(sessions.c.id == session_id).values(project_id=project_id))


def add_sampler(connection: Connection, **values: Any) -> None:
    base = {"base_digest": digest_of(values["base_model"])}
    connection.execute(insert(samplers).values({"created_at": time.time()} | base | values))
    charge(connection, values["session_id"], ROW_BYTES)


def find_sampler(connection: Connection, sampler_id: str) -> Row | None:
    return connection.execute(select(samplers).where(samplers.c.id == sampler_id)).first()


def add_copy(connection: Connection, sampler_id: str) -> int:
    """Count another copy of a sampling session's client; return its number, from 1."""
    mine = samplers.c.id == sampler_id
    connection.execute(update(samplers).where(mine).values(copies=samplers.c.copies + 1))
    return connection.execute(select(samplers.c.copies).where(mine)).scalar_one()


def samplers_of_session(connection: Connection, session_id: str) -> Sequence[Row]:
    query = select(samplers).where(samplers.c.session_id == session_id).order_by(samplers.c.created_at)
    return connection.execute(query).all()


def samplers_of_owner(connection: Connection, owner: str, limit: int) -> Sequence[Row]:
    """Return the owner's newest samplers."""
    query = select(samplers).where(samplers.c.owner == owner).order_by(samplers.c.created_at.desc())
    return connection.execute(query.limit(limit)).all()


def publish_inflight(connection: Connection, sampler_id: str) -> None:
    """Let all samplers that follow a model use the newly saved weights of one of them."""
    saved = find_sampler(connection, sampler_id)
    if saved is not None and saved.follows is not None:
        connection.execute(
            update(samplers).where(samplers.c.follows == saved.follows).values(directory=saved.directory)
        )


def _unnamed() -> ColumnElement[bool]:
    """Match samplers with weights that no checkpoint names."""
    return samplers.c.directory.is_not(None) & samplers.c.model_path.is_(None)


def delete_unnamed_samplers(connection: Connection, of: ColumnElement[bool]) -> Sequence[Row]:
    """Delete the unnamed samplers among `of`; return their rows."""
    rows = connection.execute(select(samplers).where(_unnamed() & of)).all()
    connection.execute(delete(samplers).where(_unnamed() & of))
    for session_id, count in Counter(row.session_id for row in rows).items():
        charge(connection, session_id, -count * ROW_BYTES)
    return rows


def is_sampler(sampler_id: str) -> ColumnElement[bool]:
    return samplers.c.id == sampler_id


def of_session(session_id: str) -> ColumnElement[bool]:
    return samplers.c.session_id == session_id


def of_sessions_silent_since(at: float) -> ColumnElement[bool]:
    """Match samplers of sessions that have ended, or gave no sign of life since then."""
    over = sessions.c.finished_at.is_not(None) | (sessions.c.last_heartbeat_at < at)
    return samplers.c.session_id.in_(select(sessions.c.id).where(over))


def sampler_directories(connection: Connection) -> set[str]:
    query = select(samplers.c.directory).where(samplers.c.directory.is_not(None))
    return set(connection.execute(query).scalars())


# --- the digests of base models


def record_digests(connection: Connection, digests: Mapping[str, str]) -> None:
    """Record the weights of the models that are served from now on.

    Rows of a ledger without digests are taken to be made on these weights.
    """
    for name, digest in digests.items():
        connection.execute(delete(base_models).where(base_models.c.name == name))
        connection.execute(insert(base_models).values(name=name, digest=digest, served_at=time.time()))
        for table in (models, samplers, checkpoints):
            unknown = (table.c.base_model == name) & table.c.base_digest.is_(None)
            connection.execute(update(table).where(unknown).values(base_digest=digest))


def digest_of(name: str) -> ScalarSelect:
    """Return the digest of the model served under this name, as a value to insert."""
    return select(base_models.c.digest).where(base_models.c.name == name).scalar_subquery()


# --- searching for sessions

NO_PROJECT = "default"
"""The project of sessions that name none."""


@dataclass(frozen=True)
class SessionFilter:
    """Conditions of a search for sessions.

    `before`: the session that the page before ended with. `states`: `active` and finish reasons; None: every
    state. With both `session_id` and `display_name` a session matches by either.
    """

    owner: str
    session_id: str | None = None
    display_name: str | None = None
    project_ids: list[str] | None = None
    user_metadata: dict[str, str] = field(default_factory=dict)
    states: list[str] | None = None
    active_since: float = 0.0
    before: str | None = None


def active_since(seconds: float) -> float:
    return time.time() - seconds


def _clauses(connection: Connection, wanted: SessionFilter) -> Iterator[ColumnElement[bool]]:
    yield sessions.c.owner == wanted.owner
    if wanted.project_ids is not None:
        yield func.coalesce(sessions.c.project_id, NO_PROJECT).in_(wanted.project_ids)
    if wanted.states is not None:
        lives = sessions.c.finished_at.is_(None) & (sessions.c.last_heartbeat_at >= wanted.active_since)
        reasons = [state for state in wanted.states if state != "active"]
        yield or_(lives if "active" in wanted.states else false(), sessions.c.finish_reason.in_(reasons))
    if wanted.before is not None:
        query = select(sessions.c.created_at).where(sessions.c.id == wanted.before)
        at = connection.execute(query.where(sessions.c.owner == wanted.owner)).scalar()
        younger = (sessions.c.created_at == at) & (sessions.c.id < wanted.before)
        yield false() if at is None else or_(sessions.c.created_at < at, younger)


def _matches(row: Row, wanted: SessionFilter) -> bool:
    """Compare what databases compare differently: text without regard to case, and JSON values."""
    metadata = row.user_metadata or {}
    if any(key not in metadata or str(metadata[key]) != value for key, value in wanted.user_metadata.items()):
        return False
    if wanted.session_id is None and wanted.display_name is None:
        return True
    if row.id == wanted.session_id:
        return True
    words = None if wanted.display_name is None else wanted.display_name.casefold().split()
    name = (row.display_name or "").casefold()
    return words is not None and all(word in name for word in words)


def search(connection: Connection, wanted: SessionFilter, limit: int) -> tuple[list[Row], bool]:
    """Return a page of sessions, newest first, and whether there is another page."""
    query = select(sessions).where(*_clauses(connection, wanted))
    found: list[Row] = []
    for row in connection.execute(query.order_by(sessions.c.created_at.desc(), sessions.c.id.desc())):
        if _matches(row, wanted):
            if len(found) == limit:
                return found, True
            found.append(row)
    return found, False


def state_of(row: Row, active_since: float) -> dict[str, Any] | None:
    """Describe a session's state; None if it neither finished nor gave a sign of life since then."""
    if row.finished_at is not None:
        reason = {"type": row.finish_reason or "success"}
        return {"type": "client_finished", "reason": reason, "detail": row.finish_detail}
    return {"type": "active"} if row.last_heartbeat_at >= active_since else None


ROW_BYTES = 512
"""The bytes of a row beside its values, with its place in the indexes."""
SILENT_SECONDS = 7 * 24 * 3600.0
_AT_A_TIME = 1000  # rows in one change: other writers wait for it


def size_of(*values: Any) -> int:
    """Return the bytes that a row with these values takes."""
    return ROW_BYTES + sum(
        len(value) if isinstance(value, bytes) else len(json.dumps(value)) for value in values if value
    )


_OF_MODEL = (
    *("id", "owner", "session_id", "base_model", "alias", "creation"),
    *("lora", "optimizer", "user_metadata", "configuration"),
)


def size_of_model(values: Mapping[str, Any]) -> int:
    """Return the bytes that a model's row takes; columns that change later do not count."""
    return size_of(*(values.get(name) for name in _OF_MODEL))


def charge(connection: Connection, session_id: str, size: int) -> None:
    """Add bytes to a session's size."""
    new = sessions.c.size_bytes + size
    taken = case(
        (new < ROW_BYTES, ROW_BYTES), else_=new
    )  # rows of older ledgers may have been counted too low
    connection.execute(update(sessions).where(sessions.c.id == session_id).values(size_bytes=taken))


def stored_bytes(connection: Connection, owner: str) -> int:
    query = select(func.sum(sessions.c.size_bytes)).where(sessions.c.owner == owner)
    return connection.execute(query).scalar() or 0


def require_room(connection: Connection, owner: str, limit: int) -> None:
    """Raise QuotaExceeded if the owner's sessions take as much as they may."""
    if stored_bytes(connection, owner) < limit:
        return
    _remove_empty(connection, owner)
    if stored_bytes(connection, owner) >= limit:
        _forget_descriptions(connection, owner)
    if (used := stored_bytes(connection, owner)) >= limit:
        raise QuotaExceeded(
            f"the sessions of this key's tenant, with their tags, metadata, models and samplers, take {used} "
            f"bytes in the ledger, its quota is {limit}; finish sessions that are over (ServiceClient.close, "
            "or POST /api/v1/sessions/<session>/finish)"
        )


def _finished(owner: str) -> ColumnElement[bool]:
    """Match sessions that are over, including those whose clients ended without a word."""
    silent = sessions.c.last_heartbeat_at < time.time() - SILENT_SECONDS
    return (sessions.c.owner == owner) & (sessions.c.finished_at.is_not(None) | silent)


def _remove_empty(connection: Connection, owner: str) -> None:
    """Delete the oldest finished sessions that have neither models nor samplers."""
    has_none = ~sessions.c.id.in_(select(models.c.session_id).where(models.c.owner == owner)) & (
        ~sessions.c.id.in_(select(samplers.c.session_id).where(samplers.c.owner == owner))
    )
    oldest = select(sessions.c.id).where(_finished(owner), has_none).order_by(sessions.c.created_at)
    connection.execute(delete(sessions).where(sessions.c.id.in_(oldest.limit(_AT_A_TIME))))


def _forget_descriptions(connection: Connection, owner: str) -> None:
    """Delete tags and metadata of the oldest finished sessions, whose models stay listed."""
    described = sessions.c.size_bytes > ROW_BYTES
    oldest = select(sessions.c.id).where(_finished(owner), described).order_by(sessions.c.created_at)
    emptied = update(sessions).where(sessions.c.id.in_(oldest.limit(_AT_A_TIME)))
    connection.execute(
        emptied.values(tags=[], user_metadata={}, display_name=None, finish_detail=None, size_bytes=ROW_BYTES)
    )
