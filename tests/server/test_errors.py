"""Errors as clients see them."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from fastapi import FastAPI
from fastapi.testclient import TestClient
from tinsmith.server import errors
from tinsmith.server.ledger import ledger as ledger_module
from tinsmith.server.ledger import operations
from tinsmith.server.ledger.ledger import Ledger


def test_a_ledger_that_cannot_be_read_is_503(tmp_path: Path, monkeypatch) -> None:
    """Clients come again; a 500 would look like a fault of the request's own."""
    monkeypatch.setattr(ledger_module, "BUSY_MILLISECONDS", 50)
    path = tmp_path / "ledger.db"
    ledger = Ledger(f"sqlite:///{path}")
    app = FastAPI()
    errors.install(app)

    @app.get("/unfinished")
    async def unfinished() -> int:
        return len(await ledger.read(operations.unfinished))

    client = TestClient(app)
    assert client.get("/unfinished").json() == 0
    ledger._engine.dispose()
    intruder = sqlite3.connect(path, isolation_level=None)
    intruder.execute("PRAGMA locking_mode=EXCLUSIVE")
    intruder.execute("BEGIN EXCLUSIVE")
    refused = client.get("/unfinished")
    assert refused.status_code == 503
    assert refused.headers["Retry-After"] == "5"
    assert "try again" in refused.json()["detail"]
    intruder.close()
    assert client.get("/unfinished").json() == 0
    ledger.close()
