"""Removal of what the ledger need not keep for ever.

An answer is dropped when it is old, or when its owner has too many bytes of younger ones: all owners share a
number of bytes, and one that takes more than its share loses its own. The operation stays as long as it could
be submitted again: a model's until its number has had its turn (which the model's row remembers), any other
for `TOMBSTONE_SECONDS`. The answers of creations stay, because a model is restored from its creation and the
operations after it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sqlalchemy import ColumnElement, Connection, delete, exists, func, or_, select, true, update

from ...engine import messages
from . import tenancy
from .schema import checkpoints, models, operations, payloads, rlve_runs, rlve_steps, samplers, sessions

TOMBSTONE_SECONDS = 7 * 24 * 3600.0
_AT_A_TIME = 1000  # rows deleted in one change, which other writers wait for
_ANSWERS_AT_A_TIME, _ANSWER_BYTES_AT_A_TIME = 200, 4 << 20


def _kept_answers() -> ColumnElement[bool]:
    return (operations.c.answer_bytes > 0) & operations.c.state.in_(("done", "failed"))


def answer_bytes(connection: Connection) -> dict[str, int]:
    """Return the bytes of droppable answers of each owner."""
    query = (
        select(operations.c.owner, func.sum(operations.c.answer_bytes).label("bytes"))
        .where(operations.c.finished_at.is_not(None), operations.c.answer_bytes > 0)
        .group_by(operations.c.owner)
    )
    return {row.owner: row.bytes for row in connection.execute(query)}


def fair_share(sizes: Collection[int], total: int) -> int:
    """Return how much each owner may keep so that all keep no more than `total` together.

    Owners with less keep all of it, and the others share what is left evenly.
    """
    left, share = total, 0
    for place, size in enumerate(sorted(sizes)):
        share = left // (len(sizes) - place)
        if size > share:
            return share
        left -= size
    return max(share, max(sizes, default=0))


def beyond(connection: Connection, owner: str, max_bytes: int) -> float | None:
    """Return when the youngest answer beyond the owner's newest `max_bytes` was given, if there is one."""
    younger = func.sum(operations.c.answer_bytes).over(order_by=operations.c.finished_at.desc())
    ages = select(operations.c.finished_at, younger.label("bytes")).where(
        operations.c.owner == owner, operations.c.answer_bytes > 0
    )
    total = ages.subquery()
    query = select(func.max(total.c.finished_at)).where(total.c.bytes > max_bytes)
    return connection.execute(query).scalar()


def drop_answers(connection: Connection, through: float, owner: str | None = None) -> int:
    """Drop some answers of operations finished until then; return how many, 0 when none are left.

    They are few, so that other writers do not wait long. `owner` None: of all. Creations of models keep
    theirs.
    """
    query = select(operations.c.id, operations.c.answer_bytes).where(
        _kept_answers(),
        true() if owner is None else operations.c.owner == owner,
        operations.c.finished_at <= through,
        operations.c.kind != "create_model",
    )
    chosen: list[str] = []
    left = _ANSWER_BYTES_AT_A_TIME
    for row in connection.execute(query.limit(_ANSWERS_AT_A_TIME)):
        if chosen and left < row.answer_bytes:
            break
        chosen.append(row.id)
        left -= row.answer_bytes
    dropped = update(operations).where(operations.c.id.in_(chosen)).values(answer=None, answer_bytes=0)
    return connection.execute(dropped).rowcount if chosen else 0


def drop_operations(connection: Connection, through: float, now: float, owner: str | None = None) -> bool:
    """Delete some operations that nothing needs; return whether there may be more. `owner` None: of all."""
    had_its_turn = operations.c.seq_id <= (
        select(models.c.executed_seq).where(models.c.id == operations.c.model_id).scalar_subquery()
    )
    sequenced = had_its_turn & or_(operations.c.answer.is_(None), operations.c.state == "rejected")
    single = (
        operations.c.seq_id.is_(None)
        & operations.c.answer.is_(None)
        & (operations.c.finished_at <= now - TOMBSTONE_SECONDS)
    )
    old = (
        select(operations.c.id)
        .where(
            true() if owner is None else operations.c.owner == owner,
            operations.c.finished_at <= through,
            operations.c.state != "accepted",
            ~exists().where(payloads.c.operation_id == operations.c.id),
            or_(sequenced, single),
        )
        .limit(_AT_A_TIME)
    )
    return connection.execute(delete(operations).where(operations.c.id.in_(old))).rowcount == _AT_A_TIME


# --- models


def drop_ended_models(connection: Connection, before: float) -> bool:
    """Delete some models that ended, or could not be created, before that time; return whether there may be
    more.

    Only models without checkpoints, payloads and unnamed samplers are deleted, their operations first.
    """
    unnamed = samplers.c.directory.is_not(None) & samplers.c.model_path.is_(None)
    waiting = operations.alias()
    ended = select(models.c.id).where(
        models.c.state.in_(("finished", "failed")),
        models.c.last_request_at <= before,
        models.c.id.not_in(select(checkpoints.c.run_id)),
        models.c.session_id.not_in(select(samplers.c.session_id).where(unnamed)),
        ~exists().where(payloads.c.model_id == models.c.id),
        ~exists().where(waiting.c.model_id == models.c.id, waiting.c.state == "accepted"),
    )
    some = select(operations.c.id).where(operations.c.model_id.in_(ended)).limit(_AT_A_TIME)
    if connection.execute(delete(operations).where(operations.c.id.in_(some))).rowcount:
        return True
    rows = connection.execute(select(models).where(models.c.id.in_(ended.limit(_AT_A_TIME)))).all()
    ids = [row.id for row in rows]
    connection.execute(delete(rlve_steps).where(rlve_steps.c.model_id.in_(ids)))
    connection.execute(delete(rlve_runs).where(rlve_runs.c.model_id.in_(ids)))
    connection.execute(delete(models).where(models.c.id.in_(ids)))
    for row in rows:
        tenancy.charge(connection, row.session_id, -tenancy.size_of_model(row._asdict()))
    return len(rows) == _AT_A_TIME


# --- directories


def known_models(connection: Connection) -> set[str]:
    """Return the ids of this ledger's models. Files of other models are not touched."""
    return set(connection.execute(select(models.c.id)).scalars())


def snapshots(connection: Connection) -> set[str]:
    """Return the directories of snapshots of models that can be restored."""
    query = select(models.c.snapshot, models.c.older_snapshot).where(models.c.state != "finished")
    return {directory for row in connection.execute(query) for directory in row if directory is not None}


def dead_checkpoints(connection: Connection, now: float) -> list[str]:
    """Return the directories of deleted, overwritten, failed and expired checkpoints."""
    over = checkpoints.c.state.in_(("deleted", "failed"))
    expired = (checkpoints.c.state == "complete") & (checkpoints.c.expires_at <= now)
    return list(connection.execute(select(checkpoints.c.directory).where(over | expired)).scalars())


def live_checkpoints(connection: Connection, now: float) -> dict[str, bool]:
    """Return the directories of all other checkpoints, and whether they are complete."""
    complete = checkpoints.c.state == "complete"
    unexpired = checkpoints.c.expires_at.is_(None) | (checkpoints.c.expires_at > now)
    query = select(checkpoints.c.directory, checkpoints.c.state).where(
        or_(checkpoints.c.state == "pending", complete & unexpired)
    )
    return {directory: state == "complete" for directory, state in connection.execute(query)}


def forget_checkpoints(connection: Connection, directories: Sequence[str]) -> None:
    """Delete the rows of checkpoints whose files were removed."""
    connection.execute(delete(checkpoints).where(checkpoints.c.directory.in_(directories)))


def directories_to_load(connection: Connection) -> set[str]:
    """Return the directories that a replay will read.

    These are of models that were created from a checkpoint and have no snapshot yet, and of operations that
    load a checkpoint.
    """
    creations = select(models.c.creation).where(
        models.c.snapshot.is_(None), models.c.state.in_(("creating", "ready"))
    )
    loads = (
        select(payloads.c.data)
        .join(operations, operations.c.id == payloads.c.operation_id)
        .where(operations.c.kind == "load_weights", payloads.c.data.is_not(None))
    )
    found: set[str] = set()
    for encoded in [*connection.execute(creations).scalars(), *connection.execute(loads).scalars()]:
        match messages.decode_to_engine(encoded):
            case messages.CreateModel(checkpoint=str(directory)) | messages.LoadState(directory=directory):
                found.add(directory)
    return found


def directories_sampled(connection: Connection, silent_since: float) -> set[str]:
    """Return the directories of samplers with live sessions, which stay when their name is reused."""
    alive = sessions.c.finished_at.is_(None) & (sessions.c.last_heartbeat_at >= silent_since)
    query = select(samplers.c.directory).where(
        samplers.c.directory.is_not(None), samplers.c.session_id.in_(select(sessions.c.id).where(alive))
    )
    return set(connection.execute(query).scalars())
