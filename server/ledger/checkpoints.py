"""Rows of checkpoints. Only complete ones are found and listed; an accepted save takes its name at once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, func, insert, or_, select, update

from ...ckpt.paths import CheckpointUri
from . import accounts
from .schema import checkpoints, models, sessions
from .tenancy import NO_PROJECT, digest_of


def _named(uri: CheckpointUri) -> ColumnElement[bool]:
    return (
        (checkpoints.c.run_id == uri.run)
        & (checkpoints.c.segment == uri.segment)
        & (checkpoints.c.name == uri.name)
    )


def is_alive() -> ColumnElement[bool]:
    """Match checkpoints that are complete and have not expired."""
    return (checkpoints.c.state == "complete") & or_(
        checkpoints.c.expires_at.is_(None), checkpoints.c.expires_at > time.time()
    )


def find(connection: Connection, uri: CheckpointUri) -> Row | None:
    """Return the complete, unexpired checkpoint of that name."""
    return connection.execute(select(checkpoints).where(_named(uri), is_alive())).first()


def find_by_alias(connection: Connection, owner: str, alias: str, uri: CheckpointUri) -> Row | None:
    """Return the newest complete, unexpired checkpoint of the owner's models that have or had this alias."""
    named_so = select(models.c.id).where(models.c.owner == owner, models.c.alias == alias)
    same = (checkpoints.c.segment == uri.segment) & (checkpoints.c.name == uri.name)
    query = select(checkpoints).where(checkpoints.c.run_id.in_(named_so), same, is_alive())
    return connection.execute(query.order_by(checkpoints.c.created_at.desc())).first()


def is_taken(connection: Connection, uri: CheckpointUri) -> bool:
    """Return whether a checkpoint of that name exists or is being written."""
    pending = checkpoints.c.state == "pending"
    query = select(checkpoints.c.id).where(_named(uri), or_(pending, is_alive()))
    return connection.execute(query).first() is not None


def add(connection: Connection, uri: CheckpointUri, **values: Any) -> None:
    values = {"base_digest": digest_of(values["base_model"])} | values
    connection.execute(
        insert(checkpoints).values(
            run_id=uri.run,
            segment=uri.segment,
            name=uri.name,
            state="pending",
            public=False,
            created_at=time.time(),
            **values,
        )
    )


def stored_bytes(connection: Connection, owner: str) -> int:
    """Return the size of the owner's checkpoints.

    One that is being written is counted with the size of the largest complete one.
    """
    mine = (checkpoints.c.owner == owner) & is_alive()
    size = checkpoints.c.size_bytes
    total, largest = connection.execute(select(func.sum(size), func.max(size)).where(mine)).one()
    being_written = (checkpoints.c.owner == owner) & (checkpoints.c.state == "pending")
    count = connection.execute(select(func.count()).where(being_written)).scalar() or 0
    return (total or 0) + count * (largest or 0)


def settle(connection: Connection, operation_id: str, size_bytes: int | None) -> Row | None:
    """Record that a save succeeded (`size_bytes`) or failed (None).

    A complete checkpoint of the same name is replaced. Returns the row if this call has completed it.
    """
    row = connection.execute(select(checkpoints).where(checkpoints.c.operation_id == operation_id)).first()
    if row is None or row.state != "pending":
        return None
    if size_bytes is None:
        connection.execute(update(checkpoints).where(checkpoints.c.id == row.id).values(state="failed"))
        return None
    older = _named(CheckpointUri(row.run_id, row.segment, row.name)) & (checkpoints.c.state == "complete")
    connection.execute(update(checkpoints).where(older).values(state="deleted"))
    connection.execute(
        update(checkpoints)
        .where(checkpoints.c.id == row.id)
        .values(state="complete", size_bytes=size_bytes, created_at=time.time())
    )
    return row


def record(connection: Connection, row: Row, action: str, by: str | None = None, **details: Any) -> None:
    """Record an action on the checkpoint in the audit log. `by`: the tenant that did it; None: its owner."""
    uri = CheckpointUri(row.run_id, row.segment, row.name)
    accounts.audit(
        connection,
        by or row.owner,
        f"checkpoint_{action}",
        tinker_path=str(uri),
        checkpoint_type=uri.checkpoint_type,
        model_id=row.run_id,
        **details,
    )


def fail_copies(connection: Connection) -> None:
    """Mark pending copies as failed: they were being made by a server that has ended."""
    unfinished = (checkpoints.c.state == "pending") & checkpoints.c.operation_id.startswith("copy-")
    connection.execute(update(checkpoints).where(unfinished).values(state="failed"))


def published_runs() -> Select:
    """Select the ids of runs with public checkpoints."""
    return select(checkpoints.c.run_id).where(checkpoints.c.public, is_alive())


def of_run(connection: Connection, run_id: str, published_only: bool = False) -> Sequence[Row]:
    query = select(checkpoints).where(checkpoints.c.run_id == run_id, is_alive())
    if published_only:
        query = query.where(checkpoints.c.public)
    return connection.execute(query.order_by(checkpoints.c.created_at.desc())).all()


def of_name(connection: Connection, owner: str, model: str, limit: int) -> Sequence[Row]:
    """Return checkpoints of the owner's models with that id or name, newest first."""
    mine = select(models.c.id).where(
        models.c.owner == owner, or_(models.c.id == model, models.c.alias == model)
    )
    query = select(checkpoints).where(checkpoints.c.run_id.in_(mine), is_alive())
    return connection.execute(query.order_by(checkpoints.c.created_at.desc()).limit(limit)).all()


def of_owner(connection: Connection, owner: str, limit: int, offset: int) -> tuple[Sequence[Row], int]:
    """Return a page of the owner's checkpoints, newest first, and their total number."""
    mine = (checkpoints.c.owner == owner) & is_alive()
    query = select(checkpoints).where(mine).order_by(checkpoints.c.created_at.desc())
    page = connection.execute(query.limit(limit).offset(offset)).all()
    return page, connection.execute(select(func.count()).where(mine)).scalar() or 0


def change(connection: Connection, checkpoint: int, **values: Any) -> None:
    connection.execute(update(checkpoints).where(checkpoints.c.id == checkpoint).values(**values))


def stored_by_session(connection: Connection, session_ids: list[str]) -> dict[str, tuple[int, int]]:
    """Return the number and the bytes of checkpoints for each session that has any."""
    query = (
        select(models.c.session_id, func.count(), func.sum(checkpoints.c.size_bytes))
        .join(models, models.c.id == checkpoints.c.run_id)
        .where(models.c.session_id.in_(session_ids), is_alive())
        .group_by(models.c.session_id)
    )
    return {session: (count, size or 0) for session, count, size in connection.execute(query)}


def stored_by_project(connection: Connection, owner: str, project_id: str | None) -> Sequence[Row]:
    """Return `project_id`, `number` and `size_bytes` of the owner's checkpoints, by project."""
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
