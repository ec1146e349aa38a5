"""Migrations of the ledger, and ledgers from before the first release.

The latter name a revision that led to the first release and no longer exists. They are treated as if they
were never migrated: the first migration creates the tables, columns and indexes that they lack, and fills new
columns from their rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from sqlalchemy import Connection, Table, column, delete, inspect, table, text
from sqlalchemy.schema import CreateColumn

REVISIONS = frozenset(f"{number:04}" for number in range(1, 20))
"""All revisions that a ledger from before the first release can name."""

_AT_A_TIME = 10_000


def _statements(*statements: str) -> Callable[[Connection], None]:
    def run(connection: Connection) -> None:
        for statement in statements:
            connection.exec_driver_sql(statement)

    return run


def _fill_from_natural_keys(connection: Connection) -> None:
    """Fill `session_id`, `sampler_id` and `sample_number` of operations.

    Samples had natural keys `sample/SESSION:sample:.../NUMBER`, uploaded losses `custom_loss/SESSION/NUMBER`.
    """
    some = text(
        "SELECT id, natural_key FROM operations"
        " WHERE id > :after AND kind IN ('sample', 'create_custom_loss') AND natural_key IS NOT NULL"
        " ORDER BY id LIMIT :most"
    )
    fill = text(
        "UPDATE operations SET session_id = :session, sampler_id = :sampler, sample_number = :number"
        " WHERE id = :id"
    )
    last = ""
    while found := connection.execute(some, {"after": last, "most": _AT_A_TIME}).all():
        last = found[-1].id
        filled: list[dict[str, str | int | None]] = []
        for row in found:
            kind, _, rest = row.natural_key.partition("/")
            name, _, number = rest.rpartition("/")
            if kind == "custom_loss":
                filled.append({"id": row.id, "session": name, "sampler": None, "number": None})
            elif number.isdecimal():
                session = name.partition(":sample:")[0]
                filled.append({"id": row.id, "session": session, "sampler": name, "number": int(number)})
        if filled:
            connection.execute(fill, filled)


_FILL: dict[tuple[str, str], Callable[[Connection], None]] = {
    ("operations", "sample_number"): _fill_from_natural_keys,
    ("operations", "answer_bytes"): _statements(
        "UPDATE operations SET answer_bytes = length(answer) WHERE answer IS NOT NULL",
        "UPDATE operations SET finished_at = accepted_at WHERE finished_at IS NULL AND state <> 'accepted'",
    ),
    ("sessions", "size_bytes"): _statements(
        "UPDATE sessions SET size_bytes = 512"
        " + length(CAST(tags AS TEXT)) + length(CAST(user_metadata AS TEXT))"
    ),
}
"""Functions that fill a column, by table and column, once it and those before it were added."""


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
            if (fill := _FILL.get((each.name, missing.name))) is not None:
                fill(connection)
        indexed = {found["name"] for found in inspector.get_indexes(each.name)}
        for index in each.indexes:
            if index.name not in indexed:
                index.create(connection)
