"""Rows of tenants, sessions, models and samplers."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, delete, func, insert, null, select, update

from . import session_rows
from .base_models import digest_of
from .schema import models, samplers, sessions, tenants


def model_id(session_id: str, model_seq_id: int) -> str:
    """Clients compute this id too."""
    return f"{session_id}:train:{model_seq_id}"


def ensure_tenant(connection: Connection, tenant: str) -> None:
    if connection.execute(select(tenants.c.id).where(tenants.c.id == tenant)).first() is None:
        connection.execute(insert(tenants).values(id=tenant, created_at=time.time()))


def quotas(connection: Connection) -> dict[str, dict[str, float]]:
    """Those of tenants that have some of their own."""
    rows = connection.execute(select(tenants.c.id, tenants.c.quota).where(tenants.c.quota.is_not(None)))
    return {row.id: row.quota for row in rows}


def set_quota(connection: Connection, tenant: str, quota: dict[str, float] | None) -> None:
    """None: the usual one."""
    ensure_tenant(connection, tenant)
    values = {"quota": null() if quota is None else quota}
    connection.execute(update(tenants).where(tenants.c.id == tenant).values(values))


def add_session(connection: Connection, **values: Any) -> None:
    now = time.time()
    size = session_rows.size_of(*values.values())
    connection.execute(
        insert(sessions).values(created_at=now, last_heartbeat_at=now, size_bytes=size, **values)
    )


def find_session(connection: Connection, session_id: str) -> Row | None:
    return connection.execute(select(sessions).where(sessions.c.id == session_id)).first()


SAMPLING_ENGINE = "tinsmith_sampling_engine"
"""In the metadata of a session: who draws the samples of its sampling sessions that do not say."""


def sampling_engine_of_session(connection: Connection, session_id: str) -> str | None:
    found = select(sessions.c.user_metadata).where(sessions.c.id == session_id)
    return (connection.execute(found).scalar() or {}).get(SAMPLING_ENGINE)


def list_sessions(connection: Connection, owner: str, limit: int, offset: int) -> Sequence[Row]:
    query = select(sessions).where(sessions.c.owner == owner).order_by(sessions.c.created_at.desc())
    return connection.execute(query.limit(limit).offset(offset)).all()


def heartbeat(connection: Connection, session_id: str, at: float) -> None:
    connection.execute(update(sessions).where(sessions.c.id == session_id).values(last_heartbeat_at=at))


def finish_session(connection: Connection, session_id: str, reason: str, detail: str | None) -> bool:
    """Whether it had not finished before."""
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
    session_rows.charge(connection, values["session_id"], session_rows.size_of_model(values))


def find_model(connection: Connection, model_id: str) -> Row | None:
    return connection.execute(select(models).where(models.c.id == model_id)).first()


def models_by_id(connection: Connection, ids: set[str]) -> dict[str, Row]:
    rows = connection.execute(select(models).where(models.c.id.in_(ids))).all()
    return {row.id: row for row in rows}


def find_owned(connection: Connection, owner: str, name: str) -> Row | None:
    """The owner's model of that id, or the newest that its client calls so."""
    named = (models.c.owner == owner) & ((models.c.id == name) | (models.c.alias == name))
    order = ((models.c.id == name).desc(), models.c.created_at.desc())
    return connection.execute(select(models).where(named).order_by(*order).limit(1)).first()


def update_model(connection: Connection, model_id: str, **values: Any) -> None:
    connection.execute(update(models).where(models.c.id == model_id).values(**values))


def settle_creation(connection: Connection, model_id: str, state: str) -> None:
    """A model has been created, or could not be; one whose session has ended meanwhile stays finished."""
    created = update(models).where(models.c.id == model_id, models.c.state == "creating")
    connection.execute(created.values(state=state))


def models_of_session(connection: Connection, session_id: str) -> Sequence[Row]:
    query = select(models).where(models.c.session_id == session_id).order_by(models.c.created_at)
    return connection.execute(query).all()


def list_models(
    connection: Connection, of: ColumnElement[bool], limit: int, offset: int
) -> tuple[Sequence[Row], int]:
    """A page of the training runs among `of`, newest first, and how many there are."""
    query = select(models).where(of).order_by(models.c.last_request_at.desc()).limit(limit).offset(offset)
    return connection.execute(query).all(), connection.execute(select(func.count()).where(of)).scalar() or 0


def active_models(connection: Connection, owner: str, limit: int = 1000) -> Sequence[Row]:
    """Of the owner, those that are not over, used last first."""
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
    session_rows.charge(connection, values["session_id"], session_rows.ROW_BYTES)


def find_sampler(connection: Connection, sampler_id: str) -> Row | None:
    return connection.execute(select(samplers).where(samplers.c.id == sampler_id)).first()


def add_copy(connection: Connection, sampler_id: str) -> int:
    """The number, from 1, of another copy of a sampling session's client."""
    mine = samplers.c.id == sampler_id
    connection.execute(update(samplers).where(mine).values(copies=samplers.c.copies + 1))
    return connection.execute(select(samplers.c.copies).where(mine)).scalar_one()


def samplers_of_session(connection: Connection, session_id: str) -> Sequence[Row]:
    query = select(samplers).where(samplers.c.session_id == session_id).order_by(samplers.c.created_at)
    return connection.execute(query).all()


def samplers_of_owner(connection: Connection, owner: str, limit: int) -> Sequence[Row]:
    """The newest."""
    query = select(samplers).where(samplers.c.owner == owner).order_by(samplers.c.created_at.desc())
    return connection.execute(query.limit(limit)).all()


def publish_inflight(connection: Connection, sampler_id: str) -> None:
    """The weights of a sampler are saved: if it follows its model, all that do sample them from now on."""
    saved = find_sampler(connection, sampler_id)
    if saved is not None and saved.follows is not None:
        connection.execute(
            update(samplers).where(samplers.c.follows == saved.follows).values(directory=saved.directory)
        )


def _unnamed() -> ColumnElement[bool]:
    """Samplers with weights of their own that no checkpoint names."""
    return samplers.c.directory.is_not(None) & samplers.c.model_path.is_(None)


def delete_unnamed_samplers(connection: Connection, of: ColumnElement[bool]) -> Sequence[Row]:
    """The unnamed ones among `of`; the rows that were deleted."""
    rows = connection.execute(select(samplers).where(_unnamed() & of)).all()
    connection.execute(delete(samplers).where(_unnamed() & of))
    for session_id, count in Counter(row.session_id for row in rows).items():
        session_rows.charge(connection, session_id, -count * session_rows.ROW_BYTES)
    return rows


def is_sampler(sampler_id: str) -> ColumnElement[bool]:
    return samplers.c.id == sampler_id


def of_session(session_id: str) -> ColumnElement[bool]:
    return samplers.c.session_id == session_id


def of_sessions_silent_since(at: float) -> ColumnElement[bool]:
    """Samplers of sessions that have ended, or gave no sign of life since then."""
    over = sessions.c.finished_at.is_not(None) | (sessions.c.last_heartbeat_at < at)
    return samplers.c.session_id.in_(select(sessions.c.id).where(over))


def sampler_directories(connection: Connection) -> set[str]:
    query = select(samplers.c.directory).where(samplers.c.directory.is_not(None))
    return set(connection.execute(query).scalars())
