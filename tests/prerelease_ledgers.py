"""Ledgers from before the first release, with rows in every table.

Each dump in `server/ledgers` is of an SQLite database that the migrations of that time made, up to the
revision in its name.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

from sqlalchemy import MetaData, create_engine, event, select

DUMPS = Path(__file__).parent / "server" / "ledgers"
REVISIONS = sorted(dump.stem for dump in DUMPS.glob("*.sql"))


def load(path: Path, revision: str) -> None:
    with sqlite3.connect(path) as ledger:
        ledger.executescript((DUMPS / f"{revision}.sql").read_text())
    ledger.close()


def copy(path: Path, url: str) -> None:
    """Make the same tables, indexes and rows in an empty database of another kind."""
    source, target, tables = create_engine(f"sqlite:///{path}"), create_engine(url), MetaData()

    @event.listens_for(tables, "column_reflect")
    def _generic(_inspector: Any, _table: str, column: Any) -> None:
        column["type"] = column["type"].as_generic()

    with source.connect() as reading, target.begin() as writing:
        tables.reflect(reading)
        for index in (index for table in tables.sorted_tables for index in table.indexes):
            index.dialect_options["postgresql"]["where"] = index.dialect_options["sqlite"]["where"]
        tables.create_all(writing)
        for table in tables.sorted_tables:
            rows = [dict(row._mapping) for row in reading.execute(select(table))]
            writing.execute(table.insert(), rows)
    source.dispose()
    target.dispose()
