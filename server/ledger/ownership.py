"""One server per data directory and ledger: locks on files, and a lease in the ledger.

A server locks a file in its data directory, and another one beside an SQLite ledger that is elsewhere. Its
engine inherits the open files, and the system releases a lock when no process has its file open. So the
directory of a killed server is free once its engine has ended too, and not before.

Where locks do not reach (PostgreSQL, volumes of several machines) the lease decides. Every owner has a
generation, one more than the last owner's. Each transaction of a server compares the lease's row with its
generation, so a server that was replaced neither writes nor reads. An owner renews its lease every few
seconds. It can be replaced after `EXPIRY_SECONDS` without a renewal, or when its process is seen to have
ended.

SQLite ledgers on network file systems are refused: the write-ahead log is memory shared by the processes of
one machine, and two machines would damage the database (https://www.sqlite.org/wal.html).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import orjson
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, create_engine, func, make_url, select, update
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from ..files import make_directory
from .schema import lease


class LedgerUnusable(ValueError):
    """The ledger cannot be opened; the message says why, and what to do."""


def file_of(engine: Engine) -> Path | None:
    """Return the file of an SQLite database; None for one in memory and for other databases."""
    name = engine.url.database
    return Path(name) if engine.dialect.name == "sqlite" and name and name != ":memory:" else None


def why_unusable(engine: Engine, error: Exception) -> str:
    """Say in one line why the ledger cannot be opened."""
    where = file_of(engine) or engine.url.render_as_string(hide_password=True)
    if isinstance(error, CommandError):
        return (
            f"the ledger {where} was written by a newer version of Tinsmith, which this one cannot read "
            f"({error}); start that version, or choose another --data-dir"
        )
    cause = " ".join(str(getattr(error, "orig", None) or error).split())
    if any(sign in cause for sign in ("not a database", "malformed")):
        return damaged(where, cause)
    return f"the ledger {where} cannot be opened: {cause}"


def damaged(where: Path | str, how: str) -> str:
    first = how.strip().splitlines()[0] if how.strip() else "unreadable"
    return (
        f"the ledger {where} is damaged ({first}); restore a copy of it, or move it away to start with an "
        "empty one"
    )


def no_driver(error: Exception) -> str:
    """Say what to do about a database for which no driver is installed."""
    hint = '; pip install "psycopg[binary]"' if "psycopg" in str(error) else ""
    return f"database_url: {error}{hint}"


log = logging.getLogger("tinsmith.ledger")

EXPIRY_SECONDS = 20.0
"""After this time without a sign of life, a holder on another machine counts as dead."""
_ENDING_SECONDS = 1.0  # a process that was just killed exists a little longer
_ENGINE_ENDING_SECONDS = 60.0  # for an engine whose server has ended: freeing its device may take a while
_LOOK_SECONDS = 0.05
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


class InUse(ValueError):
    """Another server, which the message names, has the data directory or the ledger."""


@dataclass(frozen=True)
class Holder:
    """A server's process. `machine` and `born` distinguish it from others with the same process id."""

    host: str
    pid: int
    since: float
    machine: str  # the machine's boot and its process namespace; empty: unknown
    born: str

    @classmethod
    def this_process(cls) -> Holder:
        return cls(socket.gethostname(), os.getpid(), time.time(), _machine(), _born(os.getpid()) or "")

    @classmethod
    def of(cls, values: Any) -> Holder | None:
        """Make a holder from what `values()` returned; None for anything else."""
        names = {field.name for field in fields(cls)}
        return cls(**values) if isinstance(values, dict) and values.keys() == names else None

    def values(self) -> dict[str, Any]:
        return asdict(self)

    def has_ended(self) -> bool | None:
        """Return whether the process has ended; None if that cannot be seen from this machine."""
        if not self.machine or self.machine != _machine():
            return None
        return _born(self.pid) != self.born

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host}, since {since}"


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _born(pid: int) -> str | None:
    """Return when the process started, in the system's ticks; None for one that has ended."""
    try:
        state, *others = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else others[18]


class FileLock:
    """An exclusive lock on a file that names its holder. Raises InUse and OSError."""

    def __init__(self, path: Path, holder: Holder, name: str):
        self._path = path
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._lock(name)
        except BaseException:
            os.close(self.descriptor)
            raise
        written = os.pwrite(self.descriptor, orjson.dumps(holder.values()), 0)
        os.ftruncate(self.descriptor, written)

    def _lock(self, name: str) -> None:
        began = time.monotonic()
        while True:
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                holder = self._holder()
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                log.warning("%s cannot be locked: %s", self._path, error.strerror)
                return
            ended = None if holder is None else holder.has_ended()
            patience = {True: _ENGINE_ENDING_SECONDS, False: _ENDING_SECONDS, None: EXPIRY_SECONDS}[ended]
            if time.monotonic() - began > patience:
                raise InUse(in_use(name, holder, "which has ended; its engine has not" if ended else ""))
            time.sleep(_LOOK_SECONDS)

    def _holder(self) -> Holder | None:
        try:
            return Holder.of(orjson.loads(os.pread(self.descriptor, 4096, 0)))
        except orjson.JSONDecodeError:
            return None  # its holder is writing it

    def release(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def in_use(name: str, holder: Holder | None, remark: str = "", other: str = "--data-dir") -> str:
    who = "an unknown process" if holder is None else str(holder)
    return (
        f"{name} is in use by another server: {who}{f' ({remark})' if remark else ''}; stop that one, "
        f"or choose another {other}"
    )


def sqlite_file(url: str) -> Path | None:
    """Return the file of an SQLite ledger; None for one in memory and for other databases.

    Raises LedgerUnusable for an invalid URL.
    """
    try:
        location = make_url(url)
    except ArgumentError as error:
        raise LedgerUnusable("database_url: write sqlite:////path/to/ledger.db or postgresql://…") from error
    if location.get_backend_name() != "sqlite" or location.database in (None, "", ":memory:"):
        return None
    return Path(str(location.database))


@contextlib.contextmanager
def connected(url: str) -> Iterator[Connection | None]:
    """Connect to the ledger at `url` without creating or migrating it; None if its file is missing.

    Raises LedgerUnusable.
    """
    file = sqlite_file(url)
    if file is not None and not file.is_file():
        yield None
        return
    try:
        engine = create_engine(url)
    except (ArgumentError, ImportError) as error:
        raise LedgerUnusable(no_driver(error)) from error
    try:
        with engine.connect() as connection:
            yield connection
    except (SQLAlchemyError, CommandError) as error:
        raise LedgerUnusable(why_unusable(engine, error)) from error
    finally:
        engine.dispose()


class Ownership:
    """This server's hold on its data directory and SQLite ledger, until `release` or its end."""

    def __init__(self, holder: Holder, locks: list[FileLock]):
        self.holder = holder
        self._locks = locks

    @property
    def descriptors(self) -> tuple[int, ...]:
        """Open files that the engine inherits, so that they stay locked until it has ended too."""
        return tuple(lock.descriptor for lock in self._locks)

    def release(self) -> None:
        for lock in self._locks:
            lock.release()


def claim(data_dir: Path, ledger_url: str) -> Ownership:
    """Lock the data directory, creating it if it is missing.

    Raises InUse if another server has it, LedgerUnusable for an SQLite ledger on a network file system, and
    OSError for a directory that cannot be written.
    """
    ledger = sqlite_file(ledger_url)
    if ledger is not None:
        require_local(ledger)
    make_directory(data_dir)
    files = {data_dir / "owner.lock": f"the data directory {data_dir.resolve()}"}
    if ledger is not None and ledger.parent.resolve() != data_dir.resolve():
        make_directory(ledger.parent)
        files[ledger.with_name(f"{ledger.name}.lock")] = f"the ledger {ledger}"
    holder = Holder.this_process()
    locks: list[FileLock] = []
    try:
        for path, name in files.items():
            locks.append(FileLock(path, holder, name))
    except BaseException:
        for lock in locks:
            lock.release()
        raise
    return Ownership(holder, locks)


def require_local(ledger: Path) -> None:
    """Raise LedgerUnusable for a file on a network file system."""
    found = network_filesystem(ledger.parent)
    if found is not None:
        raise LedgerUnusable(
            f"the ledger {ledger} would be on a network file system ({found}), where SQLite's write-ahead "
            "log is not safe. Put the data directory on a local disk; or leave it there, and set "
            "TINSMITH_DATABASE_URL to sqlite:////local/disk/ledger.db or to a PostgreSQL database"
        )


_MOUNTS = Path("/proc/self/mountinfo")
_NETWORK = frozenset(
    (
        *("nfs", "nfs4", "cifs", "smb3", "smbfs", "ncpfs", "afs", "9p", "coda"),
        *("ceph", "lustre", "gpfs", "beegfs", "glusterfs", "pvfs2", "orangefs", "wekafs", "panfs"),
        *("ocfs2", "gfs2", "vxfs", "acfs", "davfs", "davfs2"),
    )
)
_LOCAL = frozenset(("fuseblk", "fusectl", "fuse-overlayfs", "fuse.fuse-overlayfs"))


def network_filesystem(path: Path, mounts: str | None = None) -> str | None:
    """Return the type of the network file system that `path` is on, or None for a local one.

    `mounts` has the format of /proc/self/mountinfo, which is read by default. Where the system has no such
    file, every file system counts as local. So does a root of 9p or FUSE: containers and sandboxes have them.
    """
    if mounts is None:
        try:
            mounts = _MOUNTS.read_text()
        except OSError:
            return None
    resolved = path.resolve()
    mounted_on, found = Path("/"), ""
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        fields, described = before.split(), after.split()
        if len(fields) < 5 or not described:
            continue
        point = Path(_unescaped(fields[4]))
        # The later of two mounts on one folder covers the earlier one.
        if resolved.is_relative_to(point) and len(point.parts) >= len(mounted_on.parts):
            mounted_on, found = point, described[0]
    is_fuse = found.startswith("fuse") and found not in _LOCAL
    if mounted_on == Path("/") and (found == "9p" or is_fuse):
        return None
    return found if found in _NETWORK or is_fuse else None


def _unescaped(text: str) -> str:
    """Decode octal escapes, which stand for spaces and some other characters."""
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), text)


RENEWAL_SECONDS = EXPIRY_SECONDS / 4


@dataclass(frozen=True)
class Lease:
    generation: int


def _now(connection: Connection) -> float:
    """Return the time by the database's clock if several machines share the database."""
    if connection.dialect.name == "postgresql":
        return float(connection.execute(select(func.extract("epoch", func.clock_timestamp()))).scalar_one())
    return time.time()


def acquire(
    connection: Connection, holder: Holder, unlocked: bool, renewed_at: float | None
) -> Lease | float:
    """Acquire the ledger; or, if its holder may be alive, return when the holder last renewed its lease.

    `unlocked`: nobody else has the ledger's file open. `renewed_at` is what an earlier call returned: raises
    InUse if the holder has renewed its lease since.
    """
    row = connection.execute(select(lease).with_for_update()).one()
    now = _now(connection)
    known = Holder.of(row.holder)
    if known is not None and not unlocked and not known.has_ended() and now - row.renewed_at < EXPIRY_SECONDS:
        if renewed_at is not None and row.renewed_at > renewed_at:
            raise InUse(in_use("the ledger", known, other="TINSMITH_DATABASE_URL"))
        return float(row.renewed_at)
    generation = row.generation + 1
    connection.execute(update(lease).values(generation=generation, holder=holder.values(), renewed_at=now))
    return Lease(generation)


GENERATION = "SELECT generation FROM lease"
KEPT_GENERATION = f"{GENERATION} FOR SHARE"
"""The same in PostgreSQL, for a transaction that keeps the ledger until it ends."""


def is_held(connection: Connection, generation: int) -> bool:
    """Return whether the server with this generation still owns the ledger."""
    return connection.exec_driver_sql(GENERATION).scalar() == generation


def renew(connection: Connection, generation: int) -> bool:
    """Renew the lease; return whether it was still held."""
    mine = update(lease).where(lease.c.generation == generation)
    return connection.execute(mine.values(renewed_at=_now(connection))).rowcount == 1


def release(connection: Connection, generation: int) -> None:
    connection.execute(update(lease).where(lease.c.generation == generation).values(holder=None))


def ledger_id(connection: Connection) -> str:
    """Return the id of this ledger."""
    return connection.execute(select(lease.c.ledger)).scalar_one()
