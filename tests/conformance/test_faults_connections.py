"""Other ends that say nothing, or half of it, or do not listen."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

import pytest
from conformance.server_process import ServerProcess, Wire

STALL_SECONDS = 2.0
HEAD = b"POST /api/v1/create_session HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BODY = b'{"tags": [], "sdk_version": "0.38.0"}'


@pytest.fixture(scope="module")
def server(make_server) -> Iterator[ServerProcess]:
    running = make_server(TINSMITH_STALL_SECONDS=str(STALL_SECONDS)).start(wait_for_engine=False)
    running.engine.suspend()  # it is not needed
    yield running
    running.kill()


def connect(server: ServerProcess) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port))


def is_closed(connection: socket.socket, within: float) -> bool:
    connection.settimeout(within)
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


def test_hundreds_of_halves_hold_nothing_up(server: ServerProcess) -> None:
    halves = (b"", HEAD, HEAD + b"Content-Length: 1000\r\n\r\n" + BODY)
    connections = [connect(server) for _ in range(600)]
    for number, connection in enumerate(connections):
        connection.sendall(halves[number % 3])
    wire = Wire(server.url, "tml-local")
    took = []
    for _ in range(20):
        began = time.monotonic()
        assert wire.http.get("/health").status_code == 200
        assert wire.session()
        took.append(time.monotonic() - began)
    assert sorted(took)[10] < 0.5, took
    deadline = time.monotonic() + 5 * STALL_SECONDS + 10
    assert all(is_closed(connection, deadline - time.monotonic()) for connection in connections)


def test_a_head_has_its_time_and_a_body_as_long_as_it_moves(server: ServerProcess) -> None:
    dripping, slow = connect(server), connect(server)
    slow.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY))
    for number in range(12):  # over twice the time
        slow.sendall(BODY[3 * number : 3 * number + 3])
        with contextlib.suppress(OSError):  # it is closed half-way
            dripping.sendall(HEAD[number : number + 1])
        time.sleep(0.4)
    slow.sendall(BODY[36:])
    assert is_closed(dripping, 5)
    slow.settimeout(30)
    assert slow.recv(12) == b"HTTP/1.1 200"


def test_a_client_that_does_not_read_is_not_waited_for(server: ServerProcess) -> None:
    deaf = socket.socket()
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    deaf.connect(("127.0.0.1", server.port))
    deaf.settimeout(20)
    request = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"

    def ask_on() -> None:
        for _ in range(200):
            deaf.sendall(request)
            time.sleep(0.1)

    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        ask_on()
