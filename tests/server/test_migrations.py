"""Migrations of a ledger that has something in it, and of one whose server is killed meanwhile."""

from __future__ import annotations

import os
import signal
import sqlite3
from pathlib import Path

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import Engine, create_engine, event
from tinsmith.server.ledger import ledger as ledger_module
from tinsmith.server.ledger.ledger import Ledger
from tinsmith.server.ledger.schema import metadata


def make_older(path: Path) -> None:
    """A ledger of revision 0003, with an operation that was refused and one that was answered."""
    config = Config()
    folder = Path(ledger_module.__file__).parent / "migrations"
    config.set_main_option("script_location", str(folder))
    engine = create_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0003")
        connection.commit()
    engine.dispose()
    with sqlite3.connect(path) as ledger:
        ledger.execute("INSERT INTO tenants (id, created_at) VALUES ('me', 1)")
        ledger.executemany(
            "INSERT INTO operations (id, owner, kind, reply, state, answer, accepted_at, finished_at)"
            " VALUES (?, 'me', 'sample', '{}', ?, ?, 5, ?)",
            [
                ("refused", "rejected", b"12345", None),
                ("answered", "done", b"123", 7),
                ("new", "accepted", None, None),
            ],
        )
    ledger.close()


def migrate_and_die(path: Path, statements: int) -> bool:
    """In a process of its own that is killed after so many statements; whether it came to that."""
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


def test_a_kill_at_any_statement_of_a_migration(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    make_older(path)
    deaths = 0
    while migrate_and_die(path, deaths + 1):
        deaths += 1
    assert deaths > 5
    ledger = Ledger(f"sqlite:///{path}")
    engine = create_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        rows = connection.exec_driver_sql(
            "SELECT id, state, answer, answer_bytes, finished_at FROM operations ORDER BY id"
        ).all()
    engine.dispose()
    ledger.close()
    assert rows == [
        ("answered", "done", b"123", 3, 7.0),
        ("new", "accepted", None, None, None),
        ("refused", "rejected", b"12345", 5, 5.0),
    ]


def test_a_kill_during_the_first_migration_of_all(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    assert migrate_and_die(path, 20)
    ledger = Ledger(f"sqlite:///{path}")
    ledger.close()
    assert not migrate_and_die(path, 1000)
