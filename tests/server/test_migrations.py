"""Migrations of ledgers from before the first release, also when the server is killed meanwhile."""

from __future__ import annotations

import os
import signal
import sqlite3
from pathlib import Path
from typing import Any

import prerelease_ledgers
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from engineless import Server
from sqlalchemy import Connection, Engine, create_engine, event, inspect
from tinsmith.engine import messages
from tinsmith.server.ledger import operations
from tinsmith.server.ledger import operations as operation_rows
from tinsmith.server.ledger.ledger import Ledger, check
from tinsmith.server.ledger.schema import metadata
from tinsmith.server.operations.answers import KEPT

SESSION = "a1b2c3d4-0000-4000-8000-000000000001"
MODEL, SAMPLER = f"{SESSION}:train:0", f"{SESSION}:sample:0"


def migrate_and_die(path: Path, statements: int) -> bool:
    """Migrate in a child process that is killed after so many statements; return whether it was killed."""
    child = os.fork()
    if child == 0:
        left = statements

        @event.listens_for(Engine, "after_cursor_execute")
        def _count(*_: object) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        Ledger(f"sqlite:///{path}")
        os._exit(0)
    _pid, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def rows(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Return all rows of all tables, in the order of their first columns."""
    with sqlite3.connect(path) as ledger:
        ledger.row_factory = sqlite3.Row
        names = [row["name"] for row in ledger.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        found = {
            name: [dict(row) for row in ledger.execute(f"SELECT * FROM {name} ORDER BY 1, 2")]
            for name in names
            if name != "alembic_version"
        }
    ledger.close()
    return found


def structure(path: Path) -> dict[str, Any]:
    """Return each table's structure as SQLAlchemy finds it, in whatever order its columns and indexes are."""
    engine = create_engine(f"sqlite:///{path}")
    found = inspect(engine)
    tables: dict[str, Any] = {}
    for name in found.get_table_names():
        columns = {each["name"]: each | {"type": repr(each["type"])} for each in found.get_columns(name)}
        indexes = {each["name"]: repr(each["column_names"]) for each in found.get_indexes(name)}
        keys = (
            found.get_pk_constraint(name),
            sorted(map(repr, found.get_foreign_keys(name))),
            sorted(map(repr, found.get_unique_constraints(name))),
        )
        tables[name] = (columns, indexes, keys)
    engine.dispose()
    return tables


@pytest.mark.parametrize("revision", prerelease_ledgers.REVISIONS)
def test_a_ledger_from_before_the_first_release_gets_today_s_schema_and_keeps_its_rows(
    revision: str, tmp_path: Path
) -> None:
    path, fresh = tmp_path / "ledger.db", tmp_path / "fresh.db"
    prerelease_ledgers.load(path, revision)
    before = rows(path)
    check(f"sqlite:///{path}")
    assert rows(path) == before, "a check changes nothing"
    for each in (path, fresh):
        Ledger(f"sqlite:///{each}").close()
    assert structure(path) == structure(fresh)
    engine = create_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        assert connection.exec_driver_sql("PRAGMA foreign_key_check").all() == []
    engine.dispose()
    after = rows(path)
    assert all(before.values()), "the dump has rows in every table"
    for table, old in before.items():
        assert len(after[table]) == len(old)
        for then, now in zip(old, after[table], strict=True):
            changed = {name for name in then if now[name] != then[name]}
            assert changed <= ({"finished_at"} if then.get("state") == "rejected" else set())
    for row in after["operations"]:
        assert row["answer_bytes"] == (None if row["answer"] is None else len(row["answer"]))
        assert (row["finished_at"] is None) == (row["state"] == "accepted")
    assert all(row["size_bytes"] >= 512 for row in after["sessions"])
    (lease,) = after["lease"]
    assert len(lease["ledger"]) == 32
    if "lease" in before:
        assert before["lease"] == [lease]
    Ledger(f"sqlite:///{path}").close()
    assert rows(path) == after, "a second start changes nothing"


@pytest.mark.parametrize("revision", prerelease_ledgers.REVISIONS)
async def test_a_server_goes_on_with_a_ledger_from_before_the_first_release(
    revision: str, tmp_path: Path
) -> None:
    prerelease_ledgers.load(tmp_path / "ledger.db", revision)
    server = Server(tmp_path)
    await server.payloads.move_old(KEPT)
    await server.runs.resume()
    assert all(row["payload"] is None for row in rows(tmp_path / "ledger.db")["operations"])
    (waiting,) = server.operations.unanswered(MODEL)
    step = await server.operations.message(waiting)
    assert isinstance(step, messages.ForwardBackward)
    assert step.data[0].tokens == (7).to_bytes(4, "little") * 3
    sample = await server.operations.find("alice", "req_waiting")
    assert sample is not None
    assert isinstance(await server.operations.message(sample), messages.Sample)
    answered = await server.operations.find("alice", "req_copy")
    assert answered is not None
    assert isinstance(answered.answer, messages.Done)
    assert isinstance(answered.answer.output, messages.SampleOutput)
    assert await server.operations.has_expired("alice", "req_dropped")

    def of_session(connection: Connection) -> tuple:
        return (
            [row.id for row in operations.unanswered(connection, SESSION, SAMPLER)],
            [
                (row.id, row.sample_number)
                for row in operations.finished_since(connection, SESSION, SAMPLER, 0)
            ],
            [
                (row.id, row.model_id or row.sampler_id)
                for row in operations.timeline(connection, SESSION, 100)
            ],
            operation_rows.stored_custom_losses(connection, SESSION)[0],
        )

    unanswered, finished, timeline, losses = await server.ledger.read(of_session)
    assert unanswered == ["req_waiting"]
    assert finished == [("req_dropped", 1), ("req_copy", 1_000_000_003)]
    assert timeline == [
        *((name, MODEL) for name in ("req_create", "req_step", "req_next", "req_rejected")),
        *((name, SAMPLER) for name in ("req_dropped", "req_waiting", "req_copy")),
        ("req_over", f"{SESSION}:sample:train-7"),
    ]
    assert losses == 1
    assert sample.session_id == SESSION
    server.ledger.close()


def test_a_kill_at_any_statement_of_a_migration(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    prerelease_ledgers.load(path, "0003")
    deaths = 0
    while migrate_and_die(path, deaths + 1):
        deaths += 1
    assert deaths > 20
    engine = create_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()
    found = {row["id"]: row for row in rows(path)["operations"]}
    assert (found["req_rejected"]["finished_at"], found["req_copy"]["finished_at"]) == (
        found["req_rejected"]["accepted_at"],
        1790000009.5,
    )
    assert found["req_next"]["finished_at"] is None


def test_a_kill_during_the_first_migration_of_all(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    assert migrate_and_die(path, 20)
    ledger = Ledger(f"sqlite:///{path}")
    ledger.close()
    assert not migrate_and_die(path, 1000)
