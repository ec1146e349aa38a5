"""Errors as clients see them."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Iterator
from http.client import HTTPConnection, IncompleteRead
from pathlib import Path

import pytest
import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from pydantic import BaseModel
from tinsmith.server.app import create_app
from tinsmith.server.cli.connections import Connection
from tinsmith.server.cli.serve import listen
from tinsmith.server.http import errors
from tinsmith.server.http.bodies import BodyRoute
from tinsmith.server.http.hang_ups import while_connected
from tinsmith.server.ledger import ledger as ledger_module
from tinsmith.server.ledger import operations
from tinsmith.server.ledger.ledger import Ledger
from tinsmith.server.settings import Settings


class Note(BaseModel):
    note: str


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


class Broken:
    """The application with routes of which nothing handles the exceptions."""

    def __init__(self, data_dir: Path):
        self.app = create_app(Settings(data_dir=data_dir), [])
        router = APIRouter(route_class=BodyRoute)
        for path in ("/v1/raises", "/api/v1/raises"):
            router.post(path)(self.raises)
        router.post("/v1/awaits_what_was_cancelled")(self.awaits_what_was_cancelled)
        router.post("/api/v1/raises_behind_its_beginning")(self.raises_behind_its_beginning)
        self.app.include_router(router)

    async def raises(self, body: Note, request: Request) -> None:
        async def work() -> None:
            raise KeyError(body.note)

        await while_connected(request, work())

    async def awaits_what_was_cancelled(self, body: Note, request: Request) -> None:
        cancelled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        cancelled.cancel()
        await while_connected(request, asyncio.wait_for(cancelled, 1))

    async def raises_behind_its_beginning(self, body: Note) -> StreamingResponse:
        async def pieces() -> AsyncIterator[bytes]:
            yield b"a beginning"
            raise KeyError(body.note)

        return StreamingResponse(pieces())


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a server of these routes."""
    app = Broken(tmp_path_factory.mktemp("data")).app
    listener = listen("127.0.0.1", 0)
    config = uvicorn.Config(app, http=Connection, lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join()


def post(connection: HTTPConnection, path: str, size: int = 1) -> tuple[int, dict]:
    body = json.dumps({"note": "x" * size})
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


@pytest.mark.parametrize("path", ["/v1/raises", "/v1/awaits_what_was_cancelled", "/api/v1/raises"])
def test_what_nobody_handles_is_answered_with_an_error_id_and_the_connection_goes_on(
    broken: int, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    connection = HTTPConnection("127.0.0.1", broken, timeout=10)
    connection.connect()
    connection.auto_open = False
    for size in (1, 50_000):
        status, body = post(connection, path, size)
        assert status == 500
        assert (body["category"], body["status_code"], body["path"]) == ("server", 500, path)
        (found,) = re.findall("internal error ([0-9a-f]{12})", body["detail"])
        assert found in caplog.text, "with its cause"
        if path.startswith("/v1/"):
            expected = {"message": body["detail"], "type": "server_error", "param": None, "code": None}
            assert body["error"] == expected
        time.sleep(0.1)  # in which a server that closes the connection would have done so
    connection.close()


def test_an_answer_that_fails_behind_its_beginning_is_cut_off(broken: int) -> None:
    connection = HTTPConnection("127.0.0.1", broken, timeout=10)
    with pytest.raises(IncompleteRead):
        post(connection, "/api/v1/raises_behind_its_beginning")
    connection.close()
