"""One writer thread that commits in groups, and readers beside it.

The event loop never waits for a disk: `write` hands a function over a connection to the writer thread and
returns a future; whatever is waiting when the thread gets to it is committed together, each function in its
own savepoint, and the futures resolve after the commit. Functions run in the order of the `write` calls.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError, OperationalError

from ..errors import StorageFull, Unavailable

log = logging.getLogger("tinsmith.ledger")
T = TypeVar("T")
BUSY_MILLISECONDS = 10_000  # how long another process may hold the database before a write fails
_JOURNAL_BYTES = 64 << 20  # of the write-ahead log that stay on disk after a burst
_GROUP = 256  # functions in one commit, at most


def _connect(url: str, sync_every_commit: bool) -> Engine:
    engine = create_engine(url)
    if engine.dialect.name != "sqlite":
        return engine

    @event.listens_for(engine, "connect")
    def _pragmas(connection: sqlite3.Connection, _record: Any) -> None:
        connection.isolation_level = None  # transactions begin where we say so, below
        connection.execute(f"PRAGMA busy_timeout={BUSY_MILLISECONDS}")  # first: the others wait for locks too
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(f"PRAGMA synchronous={'FULL' if sync_every_commit else 'NORMAL'}")
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute(f"PRAGMA journal_size_limit={_JOURNAL_BYTES}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _file_of(engine: Engine) -> Path | None:
    """None for a database in memory, or of another kind."""
    name = engine.url.database
    return Path(name) if engine.dialect.name == "sqlite" and name and name != ":memory:" else None


def _identity(file: Path) -> tuple[int, int] | None:
    """Of the file that has this name now."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


class Ledger:
    """The database at `url`. Raises what the driver raises when it cannot be opened or migrated.

    What SQLite has committed survives the end of this process, however it ends. To survive a loss of power
    too, `sync_every_commit` waits for the disk at every commit, which costs milliseconds.
    """

    def __init__(self, url: str, sync_every_commit: bool = False):
        self._engine = _connect(url, sync_every_commit)
        self._migrate()
        self._file = _file_of(self._engine)
        self._identity = self._file and _identity(self._file)
        self._changes: queue.SimpleQueue = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write_forever, name="ledger", daemon=True)
        self._writer.start()

    def _migrate(self) -> None:
        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        with self._engine.connect().execution_options(writes=True) as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            connection.commit()

    def write(self, change: Callable[[Connection], T]) -> asyncio.Future[T]:
        """Queues `change` and returns at once; the future resolves when it is on disk.

        An exception of `change` undoes only `change`. If the commit fails the future raises StorageFull or
        Unavailable, and nothing of it was written.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        self._changes.put((change, done, loop))
        return done

    async def read(self, query: Callable[[Connection], T]) -> T:
        """Runs `query` in a thread of its own, beside the writer."""
        return await asyncio.to_thread(self.read_now, query)

    def read_now(self, query: Callable[[Connection], T]) -> T:
        """As `read`, in the caller's thread: for start-up."""
        self._require_file()
        with self._engine.connect() as connection:
            return query(connection)

    def close(self) -> None:
        """Writes what is queued, then stops."""
        self._changes.put(None)
        self._writer.join()
        self._engine.dispose()

    def _require_file(self) -> None:
        """Raises Unavailable when the file was deleted, moved or replaced: SQLite would go on writing where
        the next start does not look, and make a new one for the next connection."""
        if self._file is not None and _identity(self._file) != self._identity:
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
            self._commit(group)
            if last:
                return

    def _commit(self, group: list[tuple]) -> None:
        outcomes: list[tuple[asyncio.Future, Any, BaseException | None]] = []
        try:
            self._require_file()
            with self._engine.connect().execution_options(writes=True) as connection:
                if len(group) == 1:
                    outcomes = [_alone(connection, *group[0][:2])]
                else:
                    with connection.begin():
                        outcomes = [_among_others(connection, *each[:2]) for each in group]
        except Exception as error:
            log.exception("the ledger could not be written")
            outcomes = [(done, None, _unwritable(error)) for _change, done, _loop in group]
        try:
            group[0][2].call_soon_threadsafe(_resolve, outcomes)
        except RuntimeError:  # the event loop is closed: nobody waits any more
            log.debug("the event loop is closed")


def _alone(connection: Connection, change: Callable[[Connection], T], done: asyncio.Future[T]) -> tuple:
    """The transaction is its savepoint."""
    try:
        with connection.begin():
            value = change(connection)
        return done, value, None
    except Exception as error:
        _raise_if_unwritable(error)
        return done, None, error


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
    """What concerns the database and not the change."""
    if isinstance(error, OperationalError) or (
        isinstance(error, DBAPIError) and error.connection_invalidated
    ):
        raise error


def _unwritable(error: Exception) -> Exception:
    if isinstance(error, Unavailable):
        return error
    # SQLite ends the transaction when the disk is full; then the way back to the savepoint fails as well.
    causes: BaseException | None = error
    while causes is not None and not any(said in str(causes) for said in ("is full", "No space")):
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
