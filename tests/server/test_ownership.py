"""One server per data directory: who gets it, who is refused, and what a server does that has lost it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tinsmith.server.errors import Unavailable
from tinsmith.server.ledger import ledger as ledger_module
from tinsmith.server.ledger import ownership, tenancy
from tinsmith.server.ledger.ledger import Ledger, check, open_owned
from tinsmith.server.ledger.ownership import Holder, InUse, LedgerUnusable, network_filesystem

OWN = """
import sys, time
from pathlib import Path
from tinsmith.server.ledger.ledger import open_owned
while time.time() < float(sys.argv[2]): pass
try:
    ledger = open_owned(Path(sys.argv[1]), f"sqlite:///{sys.argv[1]}/ledger.db")
except ValueError as error:
    print(error, flush=True)
    sys.exit(2)
print("owner", flush=True)
time.sleep(600)
"""


def begin(data_dir: Path, at: float = 0.0) -> subprocess.Popen[str]:
    """A process that owns the directory, or says why not."""
    command = [sys.executable, "-c", OWN, str(data_dir), str(at)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def url(data_dir: Path) -> str:
    return f"sqlite:///{data_dir / 'ledger.db'}"


def test_one_of_several_servers_that_start_at_once_owns_the_directory(tmp_path: Path) -> None:
    at = time.time() + 4
    processes = [begin(tmp_path, at) for _ in range(4)]
    try:
        answers = {process.pid: said(process) for process in processes}
        owners = [pid for pid, answer in answers.items() if answer == "owner"]
        assert len(owners) == 1, answers
        for pid, answer in answers.items():
            if pid not in owners:
                assert f"in use by another server: process {owners[0]} on " in answer
                assert f"since {time.strftime('%Y-%m-%d')}" in answer
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_killed_owner_is_not_waited_for(tmp_path: Path) -> None:
    first = begin(tmp_path)
    assert said(first) == "owner"
    first.kill()
    began = time.monotonic()
    open_owned(tmp_path, url(tmp_path)).close()
    assert time.monotonic() - began < 10, "neither for its engine nor for its lease"
    first.wait()


def test_the_directory_is_free_when_the_engine_has_ended_too(tmp_path: Path) -> None:
    """The engine inherits the lock, so an engine that outlives its server keeps the directory closed."""
    owned = open_owned(tmp_path, url(tmp_path))
    assert owned.owner is not None
    engine = subprocess.Popen(["sleep", "600"], pass_fds=owned.owner.descriptors)
    owned.close()
    try:
        with pytest.raises(InUse):
            open_owned(tmp_path, url(tmp_path))
    finally:
        engine.kill()
        engine.wait()
    open_owned(tmp_path, url(tmp_path)).close()


def test_a_ledger_elsewhere_is_locked_as_well(tmp_path: Path) -> None:
    """Two data directories with one ledger are two servers on one ledger."""
    shared = f"sqlite:///{tmp_path / 'ledgers' / 'one.db'}"
    owned = open_owned(tmp_path / "a", shared)
    with pytest.raises(InUse, match=r"the ledger .*one\.db is in use by another server"):
        open_owned(tmp_path / "b", shared)
    owned.close()
    open_owned(tmp_path / "b", shared).close()


async def test_a_server_that_was_replaced_writes_and_reads_nothing(tmp_path: Path) -> None:
    owned = open_owned(tmp_path, url(tmp_path))
    await owned.write(lambda connection: tenancy.ensure_tenant(connection, "before"))
    with sqlite3.connect(tmp_path / "ledger.db") as thief:
        thief.execute("UPDATE lease SET generation = generation + 1")
    thief.close()

    def tenant(name: str):
        return lambda connection: tenancy.ensure_tenant(connection, name)

    alone = await asyncio.gather(owned.write(tenant("alone")), return_exceptions=True)
    together = await asyncio.gather(*(owned.write(tenant(str(n))) for n in range(5)), return_exceptions=True)
    assert [type(each) for each in alone + together] == [ledger_module.LeaseLost] * 6
    assert issubclass(ledger_module.LeaseLost, Unavailable), "a client may send it again, to the new owner"
    assert owned.lost.done()
    with pytest.raises(Unavailable):
        await owned.read(lambda connection: tenancy.quotas(connection))
    owned.close()
    with sqlite3.connect(tmp_path / "ledger.db") as reader:
        assert reader.execute("SELECT id FROM tenants").fetchall() == [("before",)]
        holder = reader.execute("SELECT holder FROM lease").fetchone()[0]
    assert json.loads(holder)["pid"] == os.getpid(), "the thief's lease is not released by who has lost it"
    reader.close()


async def test_the_write_ahead_log_stays_short_while_much_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server moves the log into the database beside its commits."""
    monkeypatch.setattr(ledger_module, "_CHECKPOINT_SECONDS", 0.05)
    monkeypatch.setattr(ledger_module, "_LONG_LOG_PAGES", 1000)
    owned = open_owned(tmp_path, url(tmp_path))
    await owned.write(lambda connection: connection.exec_driver_sql("CREATE TABLE filler (bytes BLOB)"))

    def fill(connection) -> None:
        connection.exec_driver_sql("INSERT INTO filler VALUES (zeroblob(200000))")

    for _ in range(40):
        await asyncio.gather(*(owned.write(fill) for _ in range(5)))
        await asyncio.sleep(0.01)
    assert (tmp_path / "ledger.db-wal").stat().st_size < 20 << 20, "of 40 MB"
    owned.close()
    assert not (tmp_path / "ledger.db-wal").exists()
    with sqlite3.connect(tmp_path / "ledger.db") as reader:
        assert reader.execute("SELECT count(*), sum(length(bytes)) FROM filler").fetchone() == (
            200,
            40_000_000,
        )
    reader.close()


async def test_commands_write_beside_a_server(tmp_path: Path) -> None:
    owned = open_owned(tmp_path, url(tmp_path))
    beside = Ledger(url(tmp_path))
    await beside.write(lambda connection: tenancy.ensure_tenant(connection, "alice"))
    beside.close()
    await owned.write(lambda connection: tenancy.ensure_tenant(connection, "bob"))
    assert not owned.lost.done()
    owned.close()


def test_a_process_is_distinguished_from_another_with_its_number() -> None:
    me = Holder.this_process()
    assert me.has_ended() is False
    assert Holder(me.host, me.pid, me.since, me.machine, "1").has_ended() is True, (
        "the number was given again"
    )
    assert Holder(me.host, me.pid, me.since, "another machine", me.born).has_ended() is None
    child = subprocess.Popen(["sleep", "600"])
    holder = Holder(me.host, child.pid, 0.0, me.machine, ownership._born(child.pid) or "")
    assert holder.has_ended() is False
    child.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie now
    assert holder.has_ended() is True
    child.wait()


MOUNTS = """\
22 1 254:0 / / rw,relatime - ext4 /dev/root rw
30 22 0:40 / /srv/shared rw,relatime shared:5 - nfs4 files:/export rw,vers=4.2
31 30 0:41 / /srv/shared/local\\040disk rw - xfs /dev/sdb rw
32 22 0:42 / /mnt/bucket rw - fuse.gcsfuse bucket rw
33 22 0:43 / /mnt/lustre rw - lustre mds@tcp:/scratch rw
34 22 0:44 / /mnt/usb rw - fuseblk /dev/sdc1 rw
35 22 0:45 / /mnt/over rw - nfs files:/x rw
36 22 0:46 / /mnt/over rw - tmpfs tmpfs rw
"""


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/data", None),
        ("/srv/shared", "nfs4"),
        ("/srv/shared/run/data", "nfs4"),
        ("/srv/shared-not", None),
        ("/srv/shared/local disk/data", None),
        ("/mnt/bucket/data", "fuse.gcsfuse"),
        ("/mnt/lustre/me", "lustre"),
        ("/mnt/usb/data", None),
        ("/mnt/over/data", None),
    ],
)
def test_network_file_systems(path: str, expected: str | None) -> None:
    assert network_filesystem(Path(path), MOUNTS) == expected


def test_a_container_s_root_is_its_own() -> None:
    for kind in ("9p", "fuse.fuse-overlayfs", "overlay"):
        assert network_filesystem(Path("/data"), f"22 1 0:20 / / rw - {kind} none rw") is None
    assert network_filesystem(Path("/data"), "22 1 0:20 / / rw - nfs server:/root rw") == "nfs"


def test_no_sqlite_on_a_network_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ownership, "network_filesystem", lambda path: "nfs4" if "shared" in str(path) else None
    )
    data_dir = tmp_path / "shared"
    for refused in (lambda: open_owned(data_dir, url(data_dir)), lambda: Ledger(url(data_dir))):
        with pytest.raises(LedgerUnusable, match=r"network file system \(nfs4\).*TINSMITH_DATABASE_URL"):
            refused()
    assert not data_dir.exists()
    open_owned(data_dir, url(tmp_path)).close()  # checkpoints there, and the ledger on a local disk


def damage(path: Path, revision: str | None = None, content: bytes | None = None) -> None:
    if revision is not None:
        with sqlite3.connect(path) as ledger:
            ledger.execute("UPDATE alembic_version SET version_num = ?", [revision])
        ledger.close()
    if content is not None:
        path.write_bytes(content)


@pytest.mark.parametrize("open_it", [check, Ledger])
def test_a_newer_or_damaged_ledger_is_named_in_one_line(tmp_path: Path, open_it) -> None:
    path = tmp_path / "ledger.db"
    open_owned(tmp_path, url(tmp_path)).close()
    whole = path.read_bytes()
    damage(path, revision="9999")
    with pytest.raises(
        LedgerUnusable, match=r"ledger\.db was written by a newer version of Tinsmith.*9999"
    ) as newer:
        open_it(url(tmp_path))
    damage(path, content=b"no database, but long enough to be taken for one" * 100)
    with pytest.raises(LedgerUnusable, match=r"ledger\.db is damaged") as noise:
        open_it(url(tmp_path))
    damage(path, content=whole[:100] + bytes(4096 - 100) + whole[4096:])
    with pytest.raises(LedgerUnusable, match=r"ledger\.db is damaged") as zeros:
        open_it(url(tmp_path))
    assert all("\n" not in str(error.value) for error in (newer, noise, zeros))
    damage(path, content=whole)
    open_owned(tmp_path, url(tmp_path)).close()


def test_a_check_changes_nothing(tmp_path: Path) -> None:
    check(url(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", ["ledger.db", "nosuch://host/name", "/data/ledger.db"])
def test_wrong_urls_of_databases(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(LedgerUnusable, match="database_url"):
        open_owned(tmp_path, wrong)
