"""The ledger: one writer thread that commits in groups, and concurrent readers.

The event loop never waits for a disk. `write` hands a function over a connection to the writer thread and
returns a future. All functions that are queued when the thread is free are committed together, each in a
savepoint of its own, and their futures resolve after the commit. Functions run in the order of the `write`
calls.

A server owns its ledger: each of its transactions, including those that only read, first checks the lease
(ownership.py). Commands such as `tinsmith keys` write without owning it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, create_engine, event, inspect
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError, SQLAlchemyError

from ..errors import StorageFull, Unavailable
from ..files import protect
from . import migrations
from . import ownership as leases
from .ownership import (
    LedgerUnusable,
    Ownership,
    claim,
    connected,
    damaged,
    file_of,
    no_driver,
    require_local,
    sqlite_file,
    why_unusable,
)

log = logging.getLogger("tinsmith.ledger")
T = TypeVar("T")
P = ParamSpec("P")
BUSY_MILLISECONDS = 10_000  # how long another process may hold the database before a write fails
_JOURNAL_BYTES = 64 << 20  # of the write-ahead log that stay on disk after many writes
_CHECKPOINT_SECONDS = 1.0
_CHECKPOINT_WAITS = 0.2  # seconds, for readers
_LONG_LOG_PAGES = _JOURNAL_BYTES // 4096
_GROUP = 256  # functions in one commit, at most
_MIGRATING = 0x74696E736D697468  # PostgreSQL's advisory lock for migrations
_LOOK_SECONDS = 0.5  # between checks whether the lease has expired


def _connect(url: str, sync_every_commit: bool, checkpoints: bool) -> Engine:
    """Make an engine. `checkpoints`: commits sometimes move the write-ahead log into the database."""
    engine = create_engine(url)
    if engine.dialect.name != "sqlite":
        return engine

    @event.listens_for(engine, "connect")
    def _pragmas(connection: sqlite3.Connection, _record: Any) -> None:
        connection.isolation_level = None  # `_begin` starts transactions
        connection.execute(
            f"PRAGMA busy_timeout={BUSY_MILLISECONDS}"
        )  # first, because the other pragmas wait for locks too
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(f"PRAGMA synchronous={'FULL' if sync_every_commit else 'NORMAL'}")
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute(f"PRAGMA journal_size_limit={_JOURNAL_BYTES}")
        if not checkpoints:
            connection.execute("PRAGMA wal_autocheckpoint=0")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


class Ledger:
    """The database at `url`.

    What SQLite has committed survives the end of this process, however it ends. With `sync_every_commit` it
    survives a loss of power too, at the cost of milliseconds per commit.
    """

    def __init__(self, url: str, sync_every_commit: bool = False, owner: Ownership | None = None):
        """Open and migrate the ledger. `owner`: the server that owns it until `close`, and has locked an
        SQLite file.

        Raises LedgerUnusable, and InUse while another server owns the ledger.
        """
        file = sqlite_file(url)
        if file is not None:
            require_local(file)
            # SQLite gives its other files the mode of this one.
            protect(file, *(file.with_name(file.name + each) for each in ("-wal", "-shm")))
        self.lost: concurrent.futures.Future[None] = concurrent.futures.Future()
        """Done once another server owns the ledger: this one has to stop."""
        self.owner = owner
        self._lease: leases.Lease | None = None
        try:
            self._engine = _connect(url, sync_every_commit, checkpoints=owner is None)
        except (ArgumentError, ImportError) as error:
            raise LedgerUnusable(no_driver(error)) from error
        try:
            if owner is not None and self._has_lease():
                self._own(
                    owner, unlocked=file is not None
                )  # before changing a ledger that another server may own
            self._migrate()
            if owner is not None and self._lease is None:
                self._own(owner, unlocked=file is not None)
        except (SQLAlchemyError, CommandError) as error:
            self._engine.dispose()
            raise LedgerUnusable(why_unusable(self._engine, error)) from error
        except BaseException:
            self._engine.dispose()
            raise
        with self._engine.connect() as connection:
            self.id = leases.ledger_id(connection)
        self._file = file_of(self._engine)
        self._status = None if self._file is None else self._file.stat()
        is_shared = self._engine.dialect.name == "postgresql"
        self._kept_generation = leases.KEPT_GENERATION if is_shared else leases.GENERATION
        self._changes: queue.SimpleQueue = queue.SimpleQueue()
        self.commits, self.commit_seconds = 0, 0.0  # since the server started
        self.lag_seconds = 0.0  # how long the oldest change in the newest commit took, with its wait
        self._writer = threading.Thread(target=self._write_forever, name="ledger", daemon=True)
        self._closing = threading.Event()
        self._has_written, self._log_is_long = threading.Event(), threading.Event()
        beside = {"lease": self._renew_forever, "checkpoints": self._checkpoint_forever}
        self._beside = [
            threading.Thread(target=each, name=name, daemon=True) for name, each in beside.items()
        ]
        self._writer.start()
        if self._lease is not None:
            for thread in self._beside:
                thread.start()

    def _migrate(self) -> None:
        config = _migrations()
        with self._engine.connect().execution_options(writes=True) as connection:
            if self._engine.dialect.name == "postgresql":
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_MIGRATING})")
            migrations.forget_revision(connection)
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            connection.commit()

    # --- the lease

    def _has_lease(self) -> bool:
        with self._engine.connect() as connection:
            return inspect(connection).has_table("lease")

    def _own(self, owner: Ownership, unlocked: bool) -> None:
        """Acquire the lease. Waits while its holder may be dead; raises InUse if the holder renews it."""
        renewed_at: float | None = None
        while True:
            with self._engine.connect().execution_options(writes=True) as connection, connection.begin():
                found = leases.acquire(connection, owner.holder, unlocked, renewed_at)
            if isinstance(found, leases.Lease):
                self._lease = found
                return
            if renewed_at is None:
                log.warning("the ledger has an owner; waiting for its lease to be renewed or to expire")
                renewed_at = found
            time.sleep(_LOOK_SECONDS)

    def _require_lease(self, connection: Connection) -> None:
        """Raise LeaseLost if another server owns the ledger."""
        if self._lease is not None and not leases.is_held(connection, self._lease.generation):
            self._lose()
            raise LeaseLost

    def _lose(self) -> None:
        try:
            self.lost.set_result(None)
        except concurrent.futures.InvalidStateError:
            return  # reported before
        log.error("another server owns the ledger now; this one writes nothing any more")

    def _renew_forever(self) -> None:
        assert self._lease is not None
        while not self._closing.wait(leases.RENEWAL_SECONDS) and not self.lost.done():
            try:
                self._require_file()
                if not self._renew(self._lease.generation):
                    self._lose()
            except Exception as error:  # every transaction checks the lease; the next renewal may succeed
                log.debug("the lease could not be renewed: %s", error)

    def _renew(self, generation: int) -> bool:
        """Renew the lease; return whether it is still held. With a locked SQLite file, only check it."""
        is_locked = self._file is not None
        renew = leases.is_held if is_locked else leases.renew
        connecting = self._engine.connect().execution_options(writes=not is_locked)
        with connecting as connection, connection.begin():
            return renew(connection, generation)

    def _release(self) -> None:
        assert self._lease is not None
        try:
            self._require_file()
            with self._engine.connect().execution_options(writes=True) as connection, connection.begin():
                leases.release(connection, self._lease.generation)
        except Exception as error:
            log.debug("the lease could not be released: %s", error)

    # --- the write-ahead log

    def _checkpoint_forever(self) -> None:
        """Move committed pages from the write-ahead log into the database.

        This waits for the disk, so a thread of its own does it, and no commit waits. The log restarts when a
        commit finds all of it moved, or when it is long.
        """
        if self._file is None:
            return
        while not self._closing.wait(_CHECKPOINT_SECONDS):
            if self._has_written.is_set():
                self._has_written.clear()
                if self._checkpoint("PASSIVE") > _LONG_LOG_PAGES:
                    self._log_is_long.set()

    def _checkpoint(self, mode: str) -> int:
        """Move pages; return how many the log has."""
        try:
            self._require_file()
            connection = sqlite3.connect(str(self._file), timeout=_CHECKPOINT_WAITS, isolation_level=None)
            try:
                _busy, pages, _moved = connection.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()
                return pages
            finally:
                connection.close()
        except (sqlite3.Error, Unavailable) as error:
            log.debug("the write-ahead log was not moved: %s", error)
            return 0

    # --- reading and writing

    def write(
        self, change: Callable[Concatenate[Connection, P], T], /, *args: P.args, **named: P.kwargs
    ) -> asyncio.Future[T]:
        """Queue `change` and return at once; the future resolves when it is committed. The arguments follow
        the connection.

        An exception in `change` undoes only `change`. If the commit fails, the future raises StorageFull or
        Unavailable, and nothing was written.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        self._changes.put((lambda db: change(db, *args, **named), done, loop, time.monotonic()))
        return done

    async def read(
        self, query: Callable[Concatenate[Connection, P], T], /, *args: P.args, **named: P.kwargs
    ) -> T:
        """Run `query` in a thread, concurrently with the writer. The arguments follow the connection."""
        return await asyncio.to_thread(self.read_now, query, *args, **named)

    def read_now(
        self, query: Callable[Concatenate[Connection, P], T], /, *args: P.args, **named: P.kwargs
    ) -> T:
        """Run `query` in the caller's thread; for start-up."""
        self._require_file()
        with self._engine.connect() as connection:
            self._require_lease(connection)
            return query(connection, *args, **named)

    def close(self) -> None:
        """Write what is queued, then stop."""
        self._changes.put(None)
        self._writer.join()
        if self._lease is not None:
            self._closing.set()
            for thread in self._beside:
                thread.join()
            self._release()
        self._engine.dispose()
        if self.owner is not None:
            self.owner.release()

    def _require_file(self) -> None:
        """Raise Unavailable when the file was deleted, moved or replaced.

        SQLite would keep writing to the old file, and create a new one for the next connection.
        """
        if self._file is None or self._status is None:
            return
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(self._file.stat(), self._status):
                return
        raise Unavailable(f"the ledger's file {self._file.name} is gone; nothing is accepted without it")

    def _write_forever(self) -> None:
        while (first := self._changes.get()) is not None:
            group = [first]
            last = False
            while len(group) < _GROUP and not self._changes.empty():
                change = self._changes.get()
                if change is None:
                    last = True
                    break
                group.append(change)
            began = time.monotonic()
            self._commit(group)
            now = time.monotonic()
            self.commits += 1
            self.commit_seconds += now - began
            self.lag_seconds = now - first[3]
            self._has_written.set()
            if self._log_is_long.is_set():
                self._log_is_long.clear()
                self._checkpoint("RESTART")
            if last:
                return

    def _commit(self, group: list[tuple]) -> None:
        outcomes: list[tuple[asyncio.Future, Any, BaseException | None]] = []
        lease = self._lease
        try:
            self._require_file()
            with (
                self._engine.connect().execution_options(writes=True) as connection,
                connection.begin() as transaction,
            ):
                if lease is not None:
                    held = connection.exec_driver_sql(self._kept_generation).scalar()
                    if held != lease.generation:
                        self._lose()
                        raise LeaseLost
                if len(group) > 1:
                    outcomes = [_among_others(connection, *each[:2]) for each in group]
                else:  # the transaction is its savepoint
                    change, done, *_ = group[0]
                    try:
                        outcomes = [(done, change(connection), None)]
                    except Exception as error:
                        _raise_if_unwritable(error)
                        transaction.rollback()
                        outcomes = [(done, None, error)]
        except Exception as error:
            if not isinstance(error, LeaseLost):
                log.exception("the ledger could not be written")
            outcomes = [(done, None, _unwritable(error)) for _change, done, *_ in group]
        try:
            group[0][2].call_soon_threadsafe(_resolve, outcomes)
        except RuntimeError:  # the event loop is closed
            log.debug("the event loop is closed")


class LeaseLost(Unavailable):
    """Another server owns the ledger. A client that tries again may reach that server."""

    def __init__(self) -> None:
        super().__init__("another server owns this server's ledger now, and this one stops; try again")


def open_owned(data_dir: Path, url: str, sync_every_commit: bool = False) -> Ledger:
    """Open the data directory and its ledger for this server alone. Raises as `claim` and `Ledger` do."""
    owner = claim(data_dir, url)
    try:
        return Ledger(url, sync_every_commit, owner)
    except BaseException:
        owner.release()
        raise


def check(url: str) -> None:
    """Check the ledger at `url`, if it exists, without changing it.

    Raises LedgerUnusable if it is damaged or newer than this version of Tinsmith.
    """
    file = sqlite_file(url)
    with connected(url) as connection:
        if connection is None:
            return
        if file is not None and file.stat().st_size <= _CHECKED_BYTES:
            found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
            if found != "ok":
                raise LedgerUnusable(damaged(file, str(found)))
        tables = inspect(connection).get_table_names()
        if tables and "alembic_version" not in tables:
            where = file or connection.engine.url.render_as_string(hide_password=True)
            raise LedgerUnusable(
                f"{where} is not a ledger but another program's database, with the table {tables[0]!r}; "
                "choose another --data-dir, or another TINSMITH_DATABASE_URL"
            )
        if tables:
            for revision in connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalars():
                if revision not in migrations.REVISIONS:
                    ScriptDirectory.from_config(_migrations()).get_revision(revision)


_CHECKED_BYTES = 256 << 20  # larger files take too long to check


def _migrations() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config


def _among_others(
    connection: Connection, change: Callable[[Connection], T], done: asyncio.Future[T]
) -> tuple:
    try:
        with connection.begin_nested():
            return done, change(connection), None
    except Exception as error:
        _raise_if_unwritable(error)
        return done, None, error


def _raise_if_unwritable(error: Exception) -> None:
    """Raise errors that concern the database rather than the change."""
    if isinstance(error, OperationalError) or (
        isinstance(error, DBAPIError) and error.connection_invalidated
    ):
        raise error


def _unwritable(error: Exception) -> Exception:
    if isinstance(error, Unavailable):
        return error
    # When the disk is full SQLite ends the transaction, so that rolling back to the savepoint fails too.
    causes: BaseException | None = error
    while causes is not None and not any(sign in str(causes) for sign in ("is full", "No space")):
        causes = causes.__context__
    if causes is not None:
        return StorageFull("the server's disk is full; nothing was accepted, try again later")
    return Unavailable("the ledger cannot be written at the moment; nothing was accepted, try again")


def _resolve(outcomes: list[tuple[asyncio.Future, Any, BaseException | None]]) -> None:
    for done, value, error in outcomes:
        if done.cancelled():
            continue
        if error is None:
            done.set_result(value)
        else:
            done.set_exception(error)
