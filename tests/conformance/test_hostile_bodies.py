"""While one tenant sends texts and bodies that take long to read, everybody else is answered."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable

import httpx
import pytest
import zstandard
from conformance.conftest import ALICE, BOB
from conformance.server_process import PROTOBUF, ServerProcess, Wire

MIB = 1 << 20
TEXT = "ab " * (6 * MIB // 3)
JSON = {"Content-Type": "application/json"}
ZEROS = zstandard.ZstdCompressor().compress(bytes(200 * MIB))


def numbers(mib: int) -> str:
    return "[" + ",".join(["12345"] * (mib * MIB // 6)) + "]"


DATUM = '{"model_input":{"tokens":[1,2,3]},"loss_fn_inputs":{"target_tokens":[2,3,4],"weights":[1,1,1]}}'
BODIES: dict[str, tuple[str, bytes, dict[str, str], int]] = {
    "text to generate": ("/generate", json.dumps({"text": TEXT}).encode(), JSON, 400),
    "text to completions": (
        "/v1/completions",
        json.dumps({"model": "tiny", "prompt": TEXT}).encode(),
        JSON,
        400,
    ),
    "text to chat": (
        "/v1/chat/completions",
        json.dumps({"model": "tiny", "messages": [{"role": "user", "content": TEXT}]}).encode(),
        JSON,
        400,
    ),
    "tokens to asample": (
        "/api/v1/asample",
        f'{{"base_model":"tiny","prompt":{{"tokens":{numbers(7)}}}}}'.encode(),
        JSON,
        400,
    ),
    "tokens to generate": ("/generate", f'{{"input_ids":{numbers(7)}}}'.encode(), JSON, 400),
    "datums in JSON": (
        "/api/v1/forward_backward",
        f'{{"model_id":"none","seq_id":1,"data":[{",".join([DATUM] * 16_000)}]}}'.encode(),
        JSON,
        404,
    ),
    "metadata": (
        "/api/v1/create_session",
        b'{"user_metadata":{"a":[' + b"[]," * 300_000 + b"1]}}",
        JSON,
        422,
    ),
    "metadata over the limit": ("/api/v1/create_session", b'{"a":"' + bytes(7 * MIB), JSON, 413),
    "nested lists": ("/api/v1/asample", b"[" * (7 * MIB), JSON, 400),
    "compressed zeros": (
        "/api/v1/forward_backward",
        ZEROS,
        {"Content-Type": PROTOBUF, "Content-Encoding": "zstd"},
        413,
    ),
    "many protobuf fields": (
        "/api/v1/forward_backward",
        b"\x1a\x00" * 2_000_000,
        {"Content-Type": PROTOBUF},
        400,
    ),
}


def worst_gap(url: str, work: Callable[[], None]) -> float:
    """The longest that `/healthz` was not answered while `work` ran."""
    working = threading.Thread(target=work)
    working.start()
    worst = 0.0
    with httpx.Client(base_url=url, timeout=60) as probe:
        while working.is_alive():
            began = time.perf_counter()
            assert probe.get("/healthz").status_code == 200
            worst = max(worst, time.perf_counter() - began)
            time.sleep(0.01)
    return worst


@pytest.mark.parametrize("kind", BODIES)
def test_nobody_waits_for_one_body(server: ServerProcess, kind: str) -> None:
    path, body, headers, status = BODIES[kind]
    found: list[httpx.Response] = []

    def send() -> None:
        found.append(
            httpx.post(server.url + path, content=body, headers=headers | {"X-API-Key": BOB}, timeout=60)
        )

    gap = worst_gap(server.url, send)
    assert found[0].status_code == status, found[0].text
    assert gap < 1.0


def test_nobody_waits_for_one_tenant_s_bodies(server: ServerProcess) -> None:
    """The tenant sends all of them at once; another tenant's large body is read meanwhile."""

    def send(path: str, body: bytes, headers: dict[str, str]) -> None:
        httpx.post(server.url + path, content=body, headers=headers | {"X-API-Key": BOB}, timeout=120)

    def send_all() -> None:
        threads = [
            threading.Thread(target=send, args=(path, body, headers))
            for path, body, headers, _status in BODIES.values()
        ]
        for thread in threads:
            thread.start()
        time.sleep(0.2)
        path, body, headers, status = BODIES["tokens to asample"]
        mine = httpx.post(server.url + path, content=body, headers=headers | {"X-API-Key": ALICE}, timeout=60)
        assert mine.status_code == status
        for thread in threads:
            thread.join()

    assert worst_gap(server.url, send_all) < 1.0


def test_a_large_body_is_read_as_a_small_one_is(wire: Wire) -> None:
    """Whatever process reads it: unknown fields are ignored, errors name the field."""
    prompt, padding = {"tokens": [5, 6, 7]}, "a" * 200_000
    asked = {"base_model": "tiny", "prompt": prompt, "sampling_params": {"max_tokens": 2, "seed": 3}}
    small, large = (wire.result(wire.post("asample", **asked, **more)) for more in ({}, {"x": padding}))
    assert small["sequences"][0]["tokens"] == large["sequences"][0]["tokens"]
    wrong = {"base_model": "tiny", "prompt": prompt, "num_samples": "two"}
    small, large = (wire.post("asample", **wrong, **more) for more in ({}, {"x": padding}))
    assert (small.status_code, small.json()) == (large.status_code, large.json()) == (422, small.json())
    assert small.json()["error"].startswith("num_samples: ")


def test_a_head_without_an_end_is_cut_off(server: ServerProcess) -> None:
    def send() -> None:
        for _ in range(64):
            connection.sendall(b"a" * MIB)

    with socket.create_connection(("127.0.0.1", server.port), 30) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nX-Long: ")
        with pytest.raises(ConnectionError):
            send()
    many = "".join(f"X-{number}: 1\r\n" for number in range(1000))
    with socket.create_connection(("127.0.0.1", server.port), 30) as connection:
        connection.sendall(f"GET /healthz HTTP/1.1\r\nHost: x\r\n{many}\r\n".encode())
        assert connection.recv(12) == b"HTTP/1.1 400"


def test_a_body_in_tiny_chunks(server: ServerProcess) -> None:
    """Each byte in a chunk of its own: six times the work, and copied again for each."""
    chunk = b"1\r\na\r\n"

    def send() -> None:
        with socket.create_connection(("127.0.0.1", server.port), 60) as connection:
            head = (
                "POST /api/v1/forward_backward HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
                f"X-API-Key: {BOB}\r\nContent-Type: application/json\r\n\r\n"
            )
            connection.sendall(head.encode() + chunk * (1 << 20) + b"0\r\n\r\n")
            assert connection.recv(12).startswith(b"HTTP/1.1 4")

    assert worst_gap(server.url, send) < 1.0
