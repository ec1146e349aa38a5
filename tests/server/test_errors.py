"""Errors as clients see them."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, IncompleteRead
from pathlib import Path

import httpx
import openai
import pytest
import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from pydantic import BaseModel
from tinsmith.server import errors as domain_errors
from tinsmith.server.app import create_app
from tinsmith.server.cli.serve import listen
from tinsmith.server.errors import ApiError
from tinsmith.server.http import errors
from tinsmith.server.http.bodies import BodyRoute
from tinsmith.server.http.gate import Connection
from tinsmith.server.http.samples import while_connected
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
    @app.get("/v1/unfinished")
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
    own = openai.OpenAI(base_url="http://testserver/v1", api_key="x", http_client=client, max_retries=0)
    with pytest.raises(openai.InternalServerError, match="try again") as raised:
        own.get("/unfinished", cast_to=object)
    assert (raised.value.status_code, raised.value.type) == (503, "server_error")
    intruder.close()
    assert client.get("/unfinished").json() == 0
    ledger.close()


REFUSALS = {
    name: each
    for name, each in vars(domain_errors).items()
    if isinstance(each, type) and issubclass(each, ApiError)
}
# https://github.com/openai/openai-python#handling-errors; of all others, the plain APIStatusError.
BY_STATUS = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    403: openai.PermissionDeniedError,
    404: openai.NotFoundError,
    409: openai.ConflictError,
    422: openai.UnprocessableEntityError,
    429: openai.RateLimitError,
}


class Broken:
    """The application with routes of which nothing handles the exceptions."""

    def __init__(self, data_dir: Path):
        self.app = create_app(Settings(data_dir=data_dir), [])
        router = APIRouter(route_class=BodyRoute)
        for path in ("/v1/raises", "/api/v1/raises"):
            router.post(path)(self.raises)
        router.post("/v1/refuses/{name}")(self.refuses)
        router.post("/v1/awaits_what_was_cancelled")(self.awaits_what_was_cancelled)
        router.post("/api/v1/raises_behind_its_beginning")(self.raises_behind_its_beginning)
        self.app.include_router(router)

    async def raises(self, body: Note, request: Request) -> None:
        async def work() -> None:
            raise KeyError(body.note)

        await while_connected(request, work())

    async def refuses(self, name: str) -> None:
        raise REFUSALS[name]("field: what is wrong")

    async def awaits_what_was_cancelled(self, body: Note, request: Request) -> None:
        cancelled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        cancelled.cancel()
        await while_connected(request, asyncio.wait_for(cancelled, 1))

    async def raises_behind_its_beginning(self, body: Note) -> StreamingResponse:
        async def pieces() -> AsyncIterator[bytes]:
            yield b"a beginning"
            raise KeyError(body.note)

        return StreamingResponse(pieces())


@contextmanager
def serving(app: FastAPI) -> Iterator[int]:
    """The port on which the application answers."""
    listener = listen("127.0.0.1", 0)
    config = uvicorn.Config(app, http=Connection, lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a server of these routes."""
    data = tmp_path_factory.mktemp("data")
    app, ledger = Broken(data).app, Ledger(f"sqlite:///{data / 'ledger.db'}")
    app.state.application.build(ledger)  # and not started
    with serving(app) as port:
        yield port
    ledger.close()


def post(connection: HTTPConnection, path: str, size: int = 1) -> tuple[int, dict]:
    body = json.dumps({"note": "x" * size})
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


@pytest.mark.parametrize("path", ["/v1/raises", "/v1/awaits_what_was_cancelled", "/api/v1/raises"])
def test_unhandled_errors_are_answered_with_an_id_and_the_connection_stays_open(
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


def raised_by(port: int, ask: Callable[[openai.OpenAI], object]) -> openai.APIStatusError:
    """The error that OpenAI's client makes of an answer, with the four fields that it reads."""
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="tml-none", max_retries=0)
    with client, pytest.raises(openai.APIStatusError) as raised:
        ask(client)
    error = raised.value
    usual = openai.InternalServerError if error.status_code >= 500 else openai.APIStatusError
    assert type(error) is BY_STATUS.get(error.status_code, usual)
    shown = error.response.json()["error"]
    assert shown == {
        "message": shown["message"],
        "type": error.type,
        "param": error.param,
        "code": error.code,
    }
    assert shown["message"] in str(error)
    kinds = {429: "requests"} | dict.fromkeys(range(500, 600), "server_error")
    assert error.type == kinds.get(error.status_code, "invalid_request_error")
    return error


@pytest.mark.parametrize("name", REFUSALS)
def test_openai_s_client_raises_what_belongs_to_the_status(broken: int, name: str) -> None:
    error = raised_by(broken, lambda client: client.post(f"/refuses/{name}", cast_to=object, body={}))
    assert error.status_code == REFUSALS[name].status
    assert (error.param, str(error).count("field: what is wrong")) == ("field", 1)
    assert error.response.headers.get("retry-after") == REFUSALS[name]("").headers.get("Retry-After")


@pytest.mark.parametrize(
    ("status", "ask", "says"),
    [
        (400, lambda client: client.post("/completions", cast_to=object, content=b"{"), "JSON"),
        (400, lambda client: client.post("/raises", cast_to=object, body={"note": 1}), "note"),
        (403, lambda client: client.with_options(default_headers={"Host": "x.org"}).models.list(), "x.org"),
        (403, lambda client: client.models.list(extra_headers={"Origin": "http://x.org"}), "x.org"),
        (404, lambda client: client.post("/embeddings", cast_to=object, body={}), "/v1/embeddings"),
        (405, lambda client: client.delete("/models", cast_to=object), "Not Allowed"),
        (
            413,
            lambda client: client.post("/completions", cast_to=object, body={"prompt": "a" * 17_000_000}),
            "",
        ),
        (
            415,
            lambda client: client.post(
                "/completions", cast_to=object, body={}, options={"headers": {"Content-Encoding": "gzip"}}
            ),
            "Content-Encoding",
        ),
        (
            415,
            lambda client: client.post(
                "/completions", cast_to=object, body={}, options={"headers": {"Content-Type": "text/plain"}}
            ),
            "text/plain",
        ),
        (500, lambda client: client.post("/raises", cast_to=object, body={"note": "x"}), "internal error"),
    ],
)
def test_openai_s_client_understands_answers_that_no_route_gives(
    broken: int, status: int, ask: Callable[[openai.OpenAI], object], says: str
) -> None:
    error = raised_by(broken, ask)
    assert error.status_code == status
    assert says in str(error)


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("/chat/completions", "; end the client's base URL with /v1"),
        ("/v1/v1/completions", "; end the client's base URL with one /v1"),
        (
            "/api/v1/api/v1/create_session",
            "; the client adds /api/v1 by itself: leave it out of the base URL",
        ),
        ("/v1/api/v1/create_session", "; the client adds /api/v1 by itself: leave it out of the base URL"),
        ("/api/v2/create_session", ""),
    ],
)
def test_a_wrong_base_url_is_recognised_by_its_paths(broken: int, path: str, hint: str) -> None:
    connection = HTTPConnection("127.0.0.1", broken, timeout=10)
    status, body = post(connection, path)
    assert (status, body["detail"]) == (404, f"there is no route POST {path}{hint}")
    connection.close()


def test_a_body_that_is_missing_or_no_json_is_named(broken: int) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{broken}", timeout=10) as client:
        assert client.post("/api/v1/raises").json()["detail"] == "the body is missing; send a JSON object"
        kind = {"Content-Type": "application/json"}
        cut = client.post("/api/v1/raises", content=b'{"note": ', headers=kind).json()["detail"]
        assert cut == "the body is not JSON: Expecting value at character 9"
        long = client.post("/api/v1/raises", content=b'{"note": "' + b"a" * 10, headers=kind).json()["detail"]
        assert long == "the body is not JSON: Unterminated string starting at at character 9"


def test_an_answer_that_fails_behind_its_beginning_is_cut_off(broken: int) -> None:
    connection = HTTPConnection("127.0.0.1", broken, timeout=10)
    with pytest.raises(IncompleteRead):
        post(connection, "/api/v1/raises_behind_its_beginning")
    connection.close()
