"""Ledgers from before the first release, with rows in every table.

Each dump in `server/ledgers` is of an SQLite database that the migrations of that time made, up to the
revision in its name.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

DUMPS = Path(__file__).parent / "server" / "ledgers"
REVISIONS = sorted(dump.stem for dump in DUMPS.glob("*.sql"))


def load(path: Path, revision: str) -> None:
    with sqlite3.connect(path) as ledger:
        ledger.executescript((DUMPS / f"{revision}.sql").read_text())
    ledger.close()
