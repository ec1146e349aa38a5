"""`tinsmith keys` beside a running server."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

import httpx
import pytest
from conformance.server_process import ServerProcess, Wire
from tinsmith.server.cli import app
from tinsmith.server.settings import Settings
from typer.testing import CliRunner, Result


@pytest.fixture(scope="module")
def keyless(make_server) -> ServerProcess:
    return make_server().start(wait_for_engine=False)


def keys(data_dir: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["keys", *arguments, "--data-dir", str(data_dir)])


def sessions(server: ServerProcess, key: str | None) -> httpx.Response:
    return Wire(server.url, key).http.get("/api/v1/sessions")


def becomes(server: ServerProcess, key: str | None, status: int) -> bool:
    """Within two seconds."""
    deadline = time.monotonic() + 2
    while sessions(server, key).status_code != status and time.monotonic() < deadline:
        time.sleep(0.05)
    return sessions(server, key).status_code == status


def test_created_used_revoked_refused(keyless: ServerProcess) -> None:
    before = Wire(keyless.url, None).session()
    created = keys(keyless.data_dir, "create", "alice", "--note", "laptop")
    alice = created.stdout.strip()
    bob = keys(keyless.data_dir, "create", "bob").stdout.strip()
    local = keys(keyless.data_dir, "create", "local").stdout.strip()
    assert alice.startswith("tml-")
    assert len(alice) > 40

    assert becomes(keyless, None, 401), "without a key no longer"
    assert sessions(keyless, local).status_code == 200
    assert sessions(keyless, "tml-guess").status_code == 401
    assert sessions(keyless, local).json() == {"sessions": [before]}
    mine = Wire(keyless.url, alice).session()
    assert sessions(keyless, alice).json() == {"sessions": [mine]}
    assert sessions(keyless, bob).json() == {"sessions": []}

    listed = keys(keyless.data_dir, "list").stdout.splitlines()
    (row,) = (line for line in listed if "alice" in line)
    assert "laptop" in row
    assert alice not in "".join(listed), "shown once"
    assert keys(keyless.data_dir, "revoke", row.split()[0]).exit_code == 0
    assert becomes(keyless, alice, 401)
    assert sessions(keyless, bob).status_code == 200
    assert "revoked" in keys(keyless.data_dir, "list").stdout
    second = keys(keyless.data_dir, "create", "alice").stdout.strip()
    assert becomes(keyless, second, 200)
    assert sessions(keyless, second).json() == {"sessions": [mine]}, "the tenant's things stay"


def test_the_ledger_has_only_hashes(keyless: ServerProcess) -> None:
    key = keys(keyless.data_dir, "create", "carol").stdout.strip()
    with sqlite3.connect(keyless.data_dir / "ledger.db") as connection:
        connection.execute("PRAGMA wal_checkpoint")
    for file in keyless.data_dir.glob("ledger.db*"):
        assert key.encode() not in file.read_bytes()


def test_mistakes_are_explained(tmp_path: Path) -> None:
    unknown = keys(tmp_path, "revoke", "12345678")
    assert unknown.exit_code == 2
    assert "tinsmith keys list" in unknown.stderr
    refused = keys(tmp_path, "create", "a/b")
    assert refused.exit_code == 2
    assert "letters" in refused.stderr
    assert not keys(tmp_path, "list").stdout


def test_a_stored_key_opens_the_network(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keys create"):
        Settings(host="0.0.0.0", data_dir=tmp_path)
    assert keys(tmp_path, "create", "alice").exit_code == 0
    assert Settings(host="0.0.0.0", data_dir=tmp_path).host == "0.0.0.0"
