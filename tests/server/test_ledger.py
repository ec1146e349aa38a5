"""The ledger: groups of changes, each whole or not at all, in order, and on disk when it says so."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine
from sqlalchemy.exc import IntegrityError
from tinsmith.ckpt.paths import CheckpointUri
from tinsmith.server.errors import Unavailable
from tinsmith.server.ledger import checkpoints, operations, tenancy
from tinsmith.server.ledger import ledger as ledger_module
from tinsmith.server.ledger.ledger import Ledger
from tinsmith.server.ledger.schema import metadata


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    opened = Ledger(f"sqlite:///{path}")
    yield opened
    opened.close()


def test_the_migrations_make_the_schema(ledger: Ledger, path: Path) -> None:
    engine = create_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


def add_operation(name: str, key: str | None = None):
    return lambda connection: operations.add(
        connection,
        {"id": name, "owner": "me", "natural_key": key, "kind": "sample", "reply": {}, "state": "accepted"},
    )


async def test_rows_are_there_after_a_new_start(path: Path) -> None:
    first = Ledger(f"sqlite:///{path}")
    await first.write(lambda connection: tenancy.ensure_tenant(connection, "me"))
    await asyncio.gather(*(first.write(add_operation(f"r{i}")) for i in range(500)))
    first.close()
    second = Ledger(f"sqlite:///{path}")
    rows = await second.read(operations.unfinished)
    assert [row.id for row in rows] == [f"r{i}" for i in range(500)], "in the order of the calls"
    second.close()


async def test_a_failing_change_undoes_only_itself(ledger: Ledger) -> None:
    await ledger.write(lambda connection: tenancy.ensure_tenant(connection, "me"))

    def half(connection) -> None:
        add_operation("half")(connection)
        raise ValueError("in the middle")

    outcomes = await asyncio.gather(
        ledger.write(add_operation("a", "same")),
        ledger.write(half),
        ledger.write(add_operation("b", "same")),
        ledger.write(add_operation("c")),
        return_exceptions=True,
    )
    assert outcomes[0] is None
    assert isinstance(outcomes[1], ValueError)
    assert isinstance(outcomes[2], IntegrityError), "a natural key is unique"
    assert outcomes[3] is None
    assert {row.id for row in await ledger.read(operations.unfinished)} == {"a", "c"}


async def test_the_first_answer_stays(ledger: Ledger) -> None:
    await ledger.write(lambda connection: tenancy.ensure_tenant(connection, "me"))
    await ledger.write(add_operation("a"))
    for answer in (b"first", b"second"):
        await ledger.write(operations.finish, "a", "optim_step", "", 0, "done", answer, 0.0)
    assert (await ledger.read(lambda connection: operations.find(connection, "a"))).answer == b"first"


async def test_a_locked_database_is_an_error_that_can_be_retried(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever holds the lock for longer than the busy timeout makes writes fail, not the server."""
    monkeypatch.setattr(ledger_module, "BUSY_MILLISECONDS", 100)
    ledger = Ledger(f"sqlite:///{path}")
    await ledger.write(lambda connection: tenancy.ensure_tenant(connection, "me"))
    intruder = sqlite3.connect(path, isolation_level=None)
    intruder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(Unavailable):
        await ledger.write(add_operation("a"))
    intruder.execute("ROLLBACK")
    intruder.close()
    await ledger.write(add_operation("a"))
    assert len(await ledger.read(operations.unfinished)) == 1
    ledger.close()


async def test_checkpoints_are_found_once_they_are_complete(ledger: Ledger) -> None:
    await ledger.write(lambda connection: tenancy.ensure_tenant(connection, "me"))
    uri = CheckpointUri("s:train:0", "weights", "one")

    def save(number: int):
        return lambda connection: checkpoints.add(
            connection,
            uri,
            owner="me",
            operation_id=f"r{number}",
            directory=f"d{number}",
            base_model="tiny",
            lora=None,
            optimizer={},
            user_metadata=None,
            expires_at=None,
        )

    async def found():
        row = await ledger.read(lambda connection: checkpoints.find(connection, uri))
        return None if row is None else row.directory

    await ledger.write(save(1))
    assert await found() is None
    assert await ledger.read(lambda connection: checkpoints.is_taken(connection, uri))
    await ledger.write(lambda connection: checkpoints.settle(connection, "r1", 10))
    assert await found() == "d1"
    await ledger.write(save(2))
    assert await found() == "d1", "an overwrite in the making leaves the old one"
    await ledger.write(lambda connection: checkpoints.settle(connection, "r2", None))
    assert await found() == "d1", "and so does one that failed"
    await ledger.write(save(3))
    await ledger.write(lambda connection: checkpoints.settle(connection, "r3", 10))
    assert await found() == "d3"
