"""Why a ledger cannot be opened, in one line for the operator."""

from __future__ import annotations

from pathlib import Path

from alembic.util import CommandError
from sqlalchemy import Engine


class LedgerUnusable(ValueError):
    """The ledger cannot be opened; the message says why, and what to do."""


def file_of(engine: Engine) -> Path | None:
    """None for a database in memory, or of another kind."""
    name = engine.url.database
    return Path(name) if engine.dialect.name == "sqlite" and name and name != ":memory:" else None


def why_unusable(engine: Engine, error: Exception) -> str:
    """In one line."""
    where = file_of(engine) or engine.url.render_as_string(hide_password=True)
    if isinstance(error, CommandError):
        return (
            f"the ledger {where} is of a newer version of Tinsmith, which this one cannot read ({error}); "
            "start that version, or choose another --data-dir"
        )
    cause = " ".join(str(getattr(error, "orig", None) or error).split())
    if any(sign in cause for sign in ("not a database", "malformed")):
        return damaged(where, cause)
    return f"the ledger {where} cannot be opened: {cause}"


def damaged(where: Path | str, how: str) -> str:
    first = how.strip().splitlines()[0] if how.strip() else "unreadable"
    return (
        f"the ledger {where} is damaged ({first}); put a copy of it there, or move it away to begin with an "
        "empty one"
    )


def no_driver(error: Exception) -> str:
    """What to do about a database that no installed driver reaches."""
    hint = '; pip install "psycopg[binary]"' if "psycopg" in str(error) else ""
    return f"database_url: {error}{hint}"
