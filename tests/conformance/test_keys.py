"""`tinsmith keys` beside a running server."""

from __future__ import annotations

import json
import sqlite3
import time
from http.client import HTTPConnection
from pathlib import Path

import httpx
import pytest
from conformance.server_process import ServerProcess, Wire
from conformance.test_authorisation import KEYED, NOBODYS, OPEN, OWNED
from tinsmith.server.cli import app
from tinsmith.server.settings import Settings
from typer.testing import CliRunner, Result


@pytest.fixture(scope="module")
def keyless(make_server) -> ServerProcess:
    allowed = {"TINSMITH_ALLOWED_HOSTS": "*.colab.example,gpu-1"}
    return make_server(**allowed).start(wait_for_engine=False)


def raw(server: ServerProcess, method: str, path: str, body: str | None, headers: dict[str, str]) -> str:
    """The status and the body of the answer to exactly these headers; PORT is the server's port."""
    connection = HTTPConnection("127.0.0.1", server.port)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in headers.items():
        connection.putheader(name, value.replace("PORT", str(server.port)))
    if body is not None:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(None if body is None else body.encode())
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    assert "access-control-allow-origin" not in {name.lower() for name, _ in answer.getheaders()}
    return f"{answer.status} {text}"


HERE = {"Host": "127.0.0.1:PORT"}
JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
SESSION = json.dumps({"tags": []})


@pytest.mark.parametrize(
    "headers",
    [
        HERE | JSON,
        {"Host": "localhost:PORT"} | JSON,
        {"Host": "LocalHost"} | JSON,
        {"Host": "127.0.0.2"} | JSON,
        {"Host": "[::1]:PORT"} | JSON,
        {"Host": "tinsmith.localhost:PORT"} | JSON,
        {"Host": "a.colab.example"} | JSON,
        {"Host": "gpu-1:1234"} | JSON,
        JSON,  # HTTP/1.0 and no browser
        HERE | {"Content-Type": "application/json; charset=utf-8"},
        # Our own pages, /docs among them; and pages that the operator allows.
        HERE | JSON | {"Origin": "http://127.0.0.1:PORT", "Sec-Fetch-Site": "same-origin"},
        {"Host": "localhost:PORT", "Origin": "http://localhost:PORT"} | JSON,
        {"Host": "localhost:PORT", "Origin": "http://127.0.0.1:PORT"} | JSON,
        HERE | JSON | {"Origin": "https://x.colab.example", "Sec-Fetch-Site": "cross-site"},
        {"Host": "gpu-1", "Origin": "https://gpu-1"} | JSON,
    ],
)
def test_without_keys_this_machine_s_clients_are_served(keyless: ServerProcess, headers: dict) -> None:
    answer = raw(keyless, "POST", "/api/v1/create_session", SESSION, headers)
    assert answer.startswith("200 "), answer


@pytest.mark.parametrize(
    ("headers", "status", "name"),
    [
        ({"Host": "evil.example"} | JSON, 403, "Host"),
        ({"Host": "evil.example:PORT"} | JSON, 403, "Host"),
        ({"Host": "127.0.0.1.evil.example"} | JSON, 403, "Host"),
        ({"Host": "localhost.evil.example"} | JSON, 403, "Host"),
        ({"Host": "evillocalhost"} | JSON, 403, "Host"),
        ({"Host": "colab.example"} | JSON, 403, "Host"),
        ({"Host": "10.0.0.2"} | JSON, 403, "Host"),
        ({"Host": "0.0.0.0:PORT"} | JSON, 403, "Host"),
        ({"Host": "[::2]"} | JSON, 403, "Host"),
        ({"Host": "a@evil.example:x"} | JSON, 403, "Host"),
        ({"Host": ""} | JSON, 403, "Host"),
        (HERE | JSON | {"Origin": "https://evil.example"}, 403, "Origin"),
        (HERE | JSON | {"Origin": "null"}, 403, "Origin"),
        (HERE | JSON | {"Origin": "http://127.0.0.1:1"}, 403, "Origin"),
        (HERE | JSON | {"Origin": "http://127.0.0.1"}, 403, "Origin"),
        (HERE | JSON | {"Origin": "http://gpu-10"}, 403, "Origin"),
        (HERE | JSON | {"Origin": "chrome-extension://abcdef"}, 403, "Origin"),
        # A page that was reached by a rebound name is of the same origin as what it asks.
        ({"Host": "evil.example:PORT", "Origin": "http://evil.example:PORT"} | JSON, 403, "Host"),
        (HERE | JSON | {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403, "Sec-Fetch-Site"),
        (HERE | JSON | {"Sec-Fetch-Site": "same-site"}, 403, "Sec-Fetch-Site"),
        (HERE | JSON | {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 403, "Sec-Fetch"),
        (HERE, 415, "Content-Type"),
        (HERE | {"Content-Type": "text/plain"}, 415, "Content-Type"),
        (HERE | {"Content-Type": "text/plain;charset=UTF-8"}, 415, "Content-Type"),
        (HERE | {"Content-Type": "text/plain, application/json"}, 415, "Content-Type"),
        (HERE | {"Content-Type": "multipart/form-data; boundary=x"}, 415, "Content-Type"),
        (HERE | FORM | {"Origin": "http://127.0.0.1:PORT"}, 415, "Content-Type"),
        (HERE | FORM | {"Referer": "https://evil.example/"}, 415, "Content-Type"),
        (HERE | FORM | {"User-Agent": "Mozilla/5.0"}, 415, "Content-Type"),
    ],
)
def test_without_keys_a_web_page_of_another_site_does_nothing(
    keyless: ServerProcess, headers: dict, status: int, name: str
) -> None:
    before = sessions(keyless, None).json()
    answer = raw(keyless, "POST", "/api/v1/create_session", SESSION, headers)
    assert answer.startswith(f"{status} "), answer
    assert name in json.loads(answer[4:])["error"]
    assert sessions(keyless, None).json() == before


FOREIGN = [
    {"Host": "evil.example"},
    HERE | {"Origin": "https://evil.example"},
    HERE | {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"},
]


@pytest.mark.parametrize(("method", "path"), sorted(OPEN | set(KEYED) | {route[:2] for route in OWNED}))
def test_without_keys_no_route_is_open_to_pages_of_other_sites(
    keyless: ServerProcess, method: str, path: str
) -> None:
    body = None if method == "GET" else "{}"
    for headers in FOREIGN:
        assert raw(keyless, method, NOBODYS.url(path), body, JSON | headers).startswith("403 ")
    if body is not None:
        for kind in ("text/plain", "multipart/form-data; boundary=x"):
            answer = raw(keyless, method, NOBODYS.url(path), body, HERE | {"Content-Type": kind})
            assert answer.startswith("415 ")


def test_without_keys_a_page_reads_nothing_but_a_link_may_be_followed(keyless: ServerProcess) -> None:
    foreign = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
    for path in ("/api/v1/sessions", "/docs", "/health", "/metrics"):
        assert raw(keyless, "GET", path, None, {"Host": "evil.example"}).startswith("403 ")
        assert raw(keyless, "GET", path, None, HERE | foreign).startswith("403 ")
    visit = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert raw(keyless, "GET", "/docs", None, HERE | visit).startswith("200 ")
    preflight = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    assert raw(keyless, "OPTIONS", "/api/v1/create_session", None, HERE | preflight).startswith("403 ")
    # `curl -d` says that its JSON is a form; what comes of it is the route's to say.
    sent_by_curl = HERE | FORM | {"User-Agent": "curl/8.5.0"}
    assert "Content-Type: " not in raw(keyless, "POST", "/api/v1/create_session", SESSION, sent_by_curl)


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
    assert becomes(keyless, local, 200)
    assert sessions(keyless, "tml-guess").status_code == 401
    assert sessions(keyless, local).json()["sessions"][0] == before
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
    assert keys(tmp_path, "create", "alice").exit_code == 0
    unknown = keys(tmp_path, "revoke", "12345678")
    assert unknown.exit_code == 2
    assert "tinsmith keys list" in unknown.stderr
    refused = keys(tmp_path, "create", "a/b")
    assert refused.exit_code == 2
    assert "letters" in refused.stderr
    assert len(keys(tmp_path, "list").stdout.splitlines()) == 1


def test_a_stored_key_opens_the_network(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keys create"):
        Settings(host="0.0.0.0", data_dir=tmp_path)
    assert keys(tmp_path, "create", "alice").exit_code == 0
    assert Settings(host="0.0.0.0", data_dir=tmp_path).host == "0.0.0.0"
