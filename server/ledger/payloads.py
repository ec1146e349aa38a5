"""Payloads: the messages of operations to the engine, kept while a replay may need them.

A small payload is in its row; the row of a large one says where in which file it is. Rows are written once
and deleted a few at a time, so that no other change waits long for them.

Every stream of payloads, such as that of one model, has its own files. A payload is in its file before its
row is committed, so a kill leaves at most bytes that no row points to. A file without rows is removed as a
whole, so forgetting payloads writes nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sqlalchemy import Connection, Row, Select, bindparam, delete, exists, func, insert, select, update

from ..errors import ApiError, StorageFull
from .schema import models, operations, payloads

AT_A_TIME = 100  # rows in one change: less than a megabyte of small payloads


@dataclass(frozen=True)
class Stored:
    """The place of a payload: `data` itself, or `size` bytes from `position` of a file."""

    size: int
    data: bytes | None = None
    file: str | None = None
    position: int | None = None
    checksum: int | None = None


ADD = insert(payloads)  # built once: they are part of every operation
_DROP = delete(payloads).where(payloads.c.operation_id == bindparam("key"))


def add(
    connection: Connection, operation_id: str, model_id: str | None, seq_id: int | None, stored: Stored
) -> None:
    key = {"operation_id": operation_id, "model_id": model_id, "seq_id": seq_id}
    connection.execute(ADD, key | vars(stored))


def find(connection: Connection, operation_id: str) -> Stored | None:
    row = connection.execute(select(payloads).where(payloads.c.operation_id == operation_id)).first()
    return None if row is None else Stored(row.size, row.data, row.file, row.position, row.checksum)


def replace(connection: Connection, operation_id: str, data: bytes) -> None:
    """Replace a payload by a small one."""
    values = asdict(Stored(len(data), data))
    connection.execute(update(payloads).where(payloads.c.operation_id == operation_id).values(values))


def drop(connection: Connection, operation_id: str) -> None:
    connection.execute(_DROP, {"key": operation_id})


def to_replay(connection: Connection, model_id: str, after: int, through: int) -> Sequence[Row]:
    """Return `operation_id` and `size` of the payloads after operation `after` up to `through`, in order.

    Replaying them brings a model from the state after the one to the state after the other.
    """
    query = select(payloads.c.operation_id, payloads.c.size).where(
        payloads.c.model_id == model_id, payloads.c.seq_id > after, payloads.c.seq_id <= through
    )
    return connection.execute(query.order_by(payloads.c.seq_id)).all()


def _forget(connection: Connection, of: Select) -> bool:
    """Delete some payloads of answered operations; return whether there may be more."""
    unanswered = exists().where(operations.c.id == payloads.c.operation_id, operations.c.state == "accepted")
    some = of.where(~unanswered).limit(AT_A_TIME)
    dropped = connection.execute(delete(payloads).where(payloads.c.operation_id.in_(some)))
    return dropped.rowcount == AT_A_TIME


def forget(connection: Connection, model_id: str, through: int) -> bool:
    """Delete some payloads of the model up to `through`; return whether there may be more."""
    mine = (payloads.c.model_id == model_id) & (payloads.c.seq_id <= through)
    return _forget(connection, select(payloads.c.operation_id).where(mine))


def forget_ended_models(connection: Connection) -> bool:
    """Delete some payloads of models that have ended; return whether there may be more."""
    ended = select(models.c.id).where(models.c.state.in_(("finished", "failed")))
    return _forget(connection, select(payloads.c.operation_id).where(payloads.c.model_id.in_(ended)))


def files(connection: Connection) -> set[str]:
    """Return the files that rows point into."""
    query = select(payloads.c.file).where(payloads.c.file.is_not(None)).distinct()
    return {name for name in connection.execute(query).scalars() if name is not None}


def any_in_operations(connection: Connection) -> bool:
    """Return whether rows of operations hold payloads, as in ledgers from before the first release."""
    query = select(operations.c.id).where(operations.c.payload.is_not(None)).limit(1)
    return connection.execute(query).first() is not None


def in_operations(connection: Connection, after: str, max_bytes: int) -> Sequence[Row]:
    """Return some operations after that id whose rows hold their payloads, up to `max_bytes`."""
    query = (
        select(operations.c.id, func.length(operations.c.payload).label("size"))
        .where(operations.c.payload.is_not(None), operations.c.id > after)
        .order_by(operations.c.id)
        .limit(AT_A_TIME)
    )
    chosen: list[str] = []
    for row in connection.execute(query):
        if chosen and max_bytes < row.size:
            break
        chosen.append(row.id)
        max_bytes -= row.size
    wanted = select(
        operations.c.id, operations.c.model_id, operations.c.seq_id, operations.c.kind, operations.c.payload
    )
    return connection.execute(wanted.where(operations.c.id.in_(chosen)).order_by(operations.c.id)).all()


def move(connection: Connection, row: Row, stored: Stored) -> None:
    """Move a payload out of its operation's row, unless it was moved before."""
    if find(connection, row.id) is None:
        add(connection, row.id, row.model_id, row.seq_id, stored)
    connection.execute(update(operations).where(operations.c.id == row.id).values(payload=None))


# --- files

FILE_BYTES = 64 << 20
_IDLE_SECONDS = 60.0
_SUFFIX = ".payloads"


class PayloadLost(ApiError):
    """A payload's file is missing or damaged."""


@dataclass
class _Open:
    """The file that a stream's payloads are appended to."""

    name: str
    size: int = 0
    used_at: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)
    sealed: bool = False


class PayloadFiles:
    """The files in `folder`, which is created when it is needed. Safe to use from any thread.

    `sync`: a payload is on the disk before `append` returns, and so survives a loss of power.
    """

    def __init__(self, folder: Path, sync: bool = False):
        self._folder = folder
        self._sync = sync
        self._lock = threading.Lock()
        self._open: dict[str, _Open] = {}
        self._uncommitted: Counter[str] = Counter()

    def append(self, stream: str, payload: bytes) -> Stored:
        """Write a payload. The caller must call `committed` or `abandoned` afterwards.

        Raises StorageFull, and OSError for other faults of the disk, leaving nothing behind.
        """
        while True:
            with self._lock:
                target = self._open.setdefault(stream, _Open(uuid.uuid4().hex + _SUFFIX))
                self._uncommitted[target.name] += 1
            try:
                with target.lock:
                    if not target.sealed:
                        position = self._write(target, payload)
                        break
            except BaseException:
                self._done(target.name)
                raise
            self._done(target.name)  # the file was sealed meanwhile: take the next one
        if target.size >= FILE_BYTES:
            self.seal(stream)
        return Stored(len(payload), file=target.name, position=position, checksum=zlib.crc32(payload))

    def _write(self, target: _Open, payload: bytes) -> int:
        path, position, is_new = self._folder / target.name, target.size, target.size == 0
        if is_new:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            left = memoryview(payload)
            while left:
                left = left[os.pwrite(descriptor, left, target.size + len(payload) - len(left)) :]
            if self._sync:
                os.fsync(descriptor)
                if is_new:
                    self._sync_folder()
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, position)
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise StorageFull(
                    "the server's disk is full; nothing was accepted, try again later"
                ) from error
            raise
        finally:
            os.close(descriptor)
        target.size += len(payload)
        target.used_at = time.monotonic()
        return position

    def _sync_folder(self) -> None:
        descriptor = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def read(self, stored: Stored) -> bytes:
        """Read a payload. Raises PayloadLost, and OSError for faults of the disk."""
        if stored.data is not None:
            return stored.data
        assert stored.file is not None
        try:
            with (self._folder / stored.file).open("rb") as opened:
                opened.seek(stored.position or 0)
                payload = opened.read(stored.size)
        except FileNotFoundError as error:
            raise PayloadLost(f"the file of payloads {stored.file} is gone") from error
        if len(payload) != stored.size or zlib.crc32(payload) != stored.checksum:
            raise PayloadLost(f"the file of payloads {stored.file} is damaged")
        return payload

    def committed(self, stored: Stored) -> None:
        """Note that a row points to the payload."""
        if stored.file is not None:
            self._done(stored.file)

    def abandoned(self, stored: Stored) -> None:
        """Note that no row will point to the payload, and cut it off if nothing was written after it."""
        if stored.file is None:
            return
        with self._lock:
            target = next((each for each in self._open.values() if each.name == stored.file), None)
        if target is not None:
            with target.lock, contextlib.suppress(OSError):
                assert stored.position is not None
                if not target.sealed and target.size == stored.position + stored.size:
                    os.truncate(self._folder / target.name, stored.position)
                    target.size = stored.position
        self._done(stored.file)

    def _done(self, name: str) -> None:
        with self._lock:
            self._uncommitted[name] -= 1
            if not self._uncommitted[name]:
                del self._uncommitted[name]

    def seal(self, stream: str) -> None:
        """Let the stream continue in a new file, so that the old one can be removed separately."""
        with self._lock:
            target = self._open.pop(stream, None)
        if target is not None:
            with target.lock:
                target.sealed = True

    def remove_unused(self, used: Callable[[], set[str]]) -> int:
        """Remove the files without rows, and return their bytes. `used` reads the ledger."""
        now = time.monotonic()
        with self._lock:
            idle = [stream for stream, each in self._open.items() if now - each.used_at > _IDLE_SECONDS]
        for stream in idle:
            self.seal(stream)
        with self._lock:
            busy = {each.name for each in self._open.values()} | set(self._uncommitted)
        # In this order: no row comes to point into a sealed file.
        candidates = [path for path in self._folder.glob(f"*{_SUFFIX}") if path.name not in busy]
        if not candidates:
            return 0
        needed = used()
        removed = 0
        for path in candidates:
            if path.name not in needed:
                with contextlib.suppress(FileNotFoundError):
                    removed += path.stat().st_size
                    path.unlink()
        return removed

    def used_bytes(self) -> int:
        total = 0
        for path in self._folder.glob(f"*{_SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):
                total += path.stat().st_size
        return total
