"""Ledgers from before the first release.

They name one of the revisions that led to the first release and are no longer here. Such a ledger is treated
as one that was never migrated: the first migration then creates the tables, columns and indexes that it lacks
and fills new columns from its rows.
"""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Connection, Table, column, delete, inspect, table
from sqlalchemy.schema import CreateColumn

REVISIONS = frozenset(f"{number:04}" for number in range(1, 19))
"""All revisions that a ledger from before the first release can name."""

_FILLED = {
    ("operations", "answer_bytes"): (
        "UPDATE operations SET answer_bytes = length(answer) WHERE answer IS NOT NULL",
        "UPDATE operations SET finished_at = accepted_at WHERE finished_at IS NULL AND state <> 'accepted'",
    ),
    ("sessions", "size_bytes"): (
        "UPDATE sessions SET size_bytes = 512"
        " + length(CAST(tags AS TEXT)) + length(CAST(user_metadata AS TEXT))",
    ),
}
"""By table and column, the statements that fill a column once it has been added."""


def forget_revision(connection: Connection) -> None:
    """Make Alembic run the first migration on a ledger from before the first release.

    Leave every other database alone.
    """
    if inspect(connection).has_table("alembic_version"):
        version = table("alembic_version", column("version_num"))
        connection.execute(delete(version).where(version.c.version_num.in_(REVISIONS)))


def complete(connection: Connection, tables: Iterable[Table]) -> None:
    """Add the columns and indexes that these existing tables lack, and fill those columns."""
    inspector = inspect(connection)
    for each in tables:
        present = {found["name"] for found in inspector.get_columns(each.name)}
        for missing in (wanted for wanted in each.columns if wanted.name not in present):
            specification = CreateColumn(missing).compile(dialect=connection.dialect)
            connection.exec_driver_sql(f"ALTER TABLE {each.name} ADD COLUMN {specification}")
            for statement in _FILLED.get((each.name, missing.name), ()):
                connection.exec_driver_sql(statement)
        indexed = {found["name"] for found in inspector.get_indexes(each.name)}
        for index in each.indexes:
            if index.name not in indexed:
                index.create(connection)
