"""A ledger in PostgreSQL: migrated, owned by one server, its payloads in files of the data directory.

Needs PostgreSQL's programs and psycopg (the extra `postgresql`); skipped without them.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import prerelease_ledgers
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from engineless import MODEL, Server, add_metrics, model
from postgresql import postgresql
from sqlalchemy import Connection, create_engine, text
from tinsmith.engine import messages
from tinsmith.server.ledger import payloads as payload_rows
from tinsmith.server.ledger import retention, step_metrics, tenancy
from tinsmith.server.ledger.ledger import LeaseLost, Ledger, open_owned
from tinsmith.server.ledger.ownership import InUse
from tinsmith.server.ledger.schema import metadata
from tinsmith.server.operations.operation import Submission, natural_key

OWN = """
import sys, time
from pathlib import Path
from tinsmith.server.ledger.ledger import open_owned
try:
    ledger = open_owned(Path(sys.argv[1]), sys.argv[2])
except ValueError as error:
    print(error, flush=True)
    sys.exit(2)
print("owner", flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    # Its socket's path has to be short.
    with tempfile.TemporaryDirectory() as folder, postgresql(Path(folder) / "pg") as url:
        yield url


@pytest.fixture
def url(database: str) -> str:
    """The URL of a database without tables."""
    engine = create_engine(database)
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    engine.dispose()
    return database


def begin(data_dir: Path, url: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", OWN, str(data_dir), url]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_the_migrations_make_the_schema(url: str) -> None:
    Ledger(url).close()
    engine = create_engine(url)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


def test_a_ledger_from_before_the_first_release_is_completed(url: str, tmp_path: Path) -> None:
    prerelease_ledgers.load(tmp_path / "old.db", "0013")
    prerelease_ledgers.copy(tmp_path / "old.db", url)
    ledger = Ledger(url)
    engine = create_engine(url)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        sessions = connection.execute(text("SELECT id, size_bytes FROM sessions ORDER BY id")).all()
        samples = connection.execute(
            text("SELECT id, sample_number FROM operations WHERE sampler_id IS NOT NULL ORDER BY id")
        ).all()
    engine.dispose()
    ledger.close()
    assert [size > 512 for _id, size in sessions] == [True, True]
    assert samples == [("req_copy", 1_000_000_003), ("req_dropped", 1), ("req_over", 12), ("req_waiting", 2)]


def test_one_of_two_servers_with_directories_of_their_own_owns_the_ledger(tmp_path: Path, url: str) -> None:
    """Started at once on an empty database, as two machines would. The owner's death frees it."""
    processes = [begin(tmp_path / name, url) for name in "ab"]
    try:
        answers = {process.pid: said(process) for process in processes}
        (owner,) = (process for process in processes if answers[process.pid] == "owner")
        (refusal,) = (answer for answer in answers.values() if answer != "owner")
        assert f"the ledger is in use by another server: process {owner.pid} on " in refusal
        owner.kill()
        owner.wait()
        began = time.monotonic()
        open_owned(tmp_path / "c", url).close()
        assert time.monotonic() - began < 10, "its process is seen to have ended; its lease is not waited for"
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_silent_owner_on_another_machine_is_replaced_when_its_lease_expires(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinsmith.server.ledger.ownership.EXPIRY_SECONDS", 3.0)
    Ledger(url).close()
    engine = create_engine(url)
    elsewhere = '{"host": "elsewhere", "pid": 7, "since": 1.0, "machine": "another boot", "born": "5"}'
    with engine.begin() as connection:
        connection.execute(
            text("UPDATE lease SET holder = :holder, renewed_at = extract(epoch from clock_timestamp())"),
            {"holder": elsewhere},
        )
    began = time.monotonic()
    owned = open_owned(tmp_path, url)
    assert 2.0 < time.monotonic() - began < 8.0
    with engine.begin() as connection:
        connection.execute(text("UPDATE lease SET renewed_at = renewed_at + 100"))  # it renews and renews
    engine.dispose()
    with pytest.raises(InUse):
        open_owned(tmp_path, url)
    owned.close()


async def test_a_replaced_server_writes_nothing_not_even_what_was_begun(tmp_path: Path, url: str) -> None:
    owned = open_owned(tmp_path, url)
    engine = create_engine(url)

    def slow(connection) -> None:
        tenancy.ensure_tenant(connection, "slow")
        time.sleep(1.0)

    writing = owned.write(slow)
    await asyncio.sleep(0.3)

    def steal() -> float:
        began = time.monotonic()
        with engine.begin() as connection:
            connection.execute(text("UPDATE lease SET generation = generation + 1"))
        return time.monotonic() - began

    assert await asyncio.to_thread(steal) > 0.3, "a lease cannot change hands within another's transaction"
    await writing
    with pytest.raises(LeaseLost):
        await owned.write(lambda connection: tenancy.ensure_tenant(connection, "late"))
    assert owned.lost.done()
    with engine.connect() as connection:
        assert connection.execute(text("SELECT id FROM tenants")).scalars().all() == ["slow"]
    engine.dispose()
    owned.close()


async def test_operations_and_payloads(tmp_path: Path, url: str) -> None:
    server = Server(tmp_path, database_url=url)
    await server.ledger.write(model)
    await server.runs.find("me", MODEL)

    def step(number: int, size: int) -> Submission:
        data = [messages.Datum(bytes(size), {})]
        return Submission(
            "me",
            "forward_backward",
            natural_key(MODEL, number),
            lambda request_id: messages.ForwardBackward(request_id, MODEL, data, "cross_entropy"),
            model_id=MODEL,
            seq_id=number,
        )

    for number, size in enumerate((100, 100_000, 300_000), start=1):
        operation = await server.operations.accept(step(number, size))
        server.operations.on_answer(
            messages.Done(operation.request_id, messages.ForwardBackwardOutput([], {}))
        )
        await operation.finished.wait()
    waiting = await server.operations.accept(step(4, 200_000))
    assert list((tmp_path / "payloads" / server.ledger.id).iterdir()) != []
    again = Server(tmp_path, database_url=url)
    await again.runs.resume()
    (found,) = again.operations.unanswered(MODEL)
    assert found.request_id == waiting.request_id
    message = await again.operations.message(found)
    assert isinstance(message, messages.ForwardBackward)
    assert message.data[0].tokens == bytes(200_000)
    replay = await again.ledger.read(lambda connection: payload_rows.to_replay(connection, MODEL, 0, 3))
    assert len(replay) == 3
    await again.payloads.forget_through(MODEL, 3)
    assert await again.ledger.read(lambda connection: payload_rows.to_replay(connection, MODEL, 0, 3)) == []
    await again.operations.forget_answers("me", time.time())
    assert not await again.ledger.read(retention.answer_bytes)
    await again.sweep.sweep()
    for each in (server, again):
        each.ledger.close()


async def test_step_metrics_are_kept_and_thinned(tmp_path: Path, url: str) -> None:
    server, last = Server(tmp_path, database_url=url), 3 * step_metrics.MOST_ROWS

    def train(connection: Connection) -> None:
        model(connection)
        for number in [*range(1, last + 1), last]:
            add_metrics(connection, "optim_step", number, {"grad_norm": 1.0}, number)
        step_metrics.report(connection, MODEL, 5, {"reward": 0.5})
        step_metrics.report(connection, MODEL, 5, {"accuracy": 0.25})

    await server.ledger.write(train)
    rows = await server.ledger.read(lambda connection: step_metrics.since(connection, MODEL, 0, 0.0))
    assert len(rows) <= step_metrics.MOST_ROWS
    assert [row.step for row in rows if row.kind == "optim_step"][-100:] == list(range(last - 99, last + 1))
    assert [row.metrics for row in rows if row.kind == "reported"] == [{"reward": 0.5, "accuracy": 0.25}]
    newest = await server.ledger.read(lambda connection: step_metrics.newest(connection, [MODEL]))
    assert {last, 5} <= {row.step for row in newest}
    while await server.ledger.write(lambda connection: step_metrics.thin_owner(connection, "me", 10_000)):
        pass
    rows = await server.ledger.read(lambda connection: step_metrics.since(connection, MODEL, 0, 0.0))
    assert 0 < sum(row.size for row in rows) <= 10_000
    server.ledger.close()
