"""Closing the connection cancels the samples that a request waits for, on every route that waits."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import httpx
import pytest
from conformance.server_process import ServerProcess, Wire

SAMPLES = 64
PROMPT = [5, 9, 77, 30, 12, 6]
SGLANG = {"max_new_tokens": 400, "ignore_eos": True, "n": SAMPLES}
OPENAI = {"model": "tiny", "max_tokens": 400, "n": SAMPLES}
NATIVE = {"base_model": "tiny", "num_samples": SAMPLES, "sampling_params": {"max_tokens": 400, "stop": []}}
BODIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "generate": ("/generate", {"input_ids": PROMPT, "sampling_params": SGLANG}, 1),
    "generate several prompts": ("/generate", {"input_ids": [PROMPT] * 3, "sampling_params": SGLANG}, 3),
    "completions": ("/v1/completions", OPENAI | {"prompt": PROMPT}, 1),
    "completions of several prompts": ("/v1/completions", OPENAI | {"prompt": [PROMPT] * 3}, 3),
    "stream": ("/v1/completions", OPENAI | {"prompt": PROMPT, "stream": True}, 1),
    "chat": ("/v1/chat/completions", OPENAI | {"messages": [{"role": "user", "content": "a b"}]}, 1),
    "sample": ("/api/v1/sample", NATIVE | {"prompt": {"tokens": PROMPT}}, 1),
    "samples that are waited for": ("/api/v1/sample?wait=true", NATIVE | {"prompts": [PROMPT] * 3}, 3),
}


def connect(wire: Wire, path: str, body: dict[str, Any]) -> socket.socket:
    """A connection on which the whole request is sent and nothing is read."""
    url = wire.http.base_url
    sent = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {url.host}\r\nX-API-Key: {wire.http.headers['x-api-key']}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(sent)}\r\n\r\n"
    )
    connection = socket.create_connection((url.host, url.port))
    connection.sendall(head.encode() + sent)
    return connection


def active(wire: Wire) -> int:
    return wire.http.get("/health").json()["active_requests"]


def wait_until(wire: Wire, count: int, seconds: float) -> float:
    began = time.monotonic()
    while active(wire) != count:
        assert time.monotonic() - began < seconds, f"{active(wire)} samples are not {count}"
        time.sleep(0.02)
    return time.monotonic() - began


@pytest.fixture(scope="module")
def whole(server: Any) -> float:
    """Seconds that one request of this size takes, once compiled."""
    with httpx.Client(base_url=server.url, headers={"X-API-Key": "tml-alice"}, timeout=300) as client:
        for _ in range(2):
            began = time.monotonic()
            path, body, _count = BODIES["completions"]
            client.post(path, json=body).raise_for_status()
            took = time.monotonic() - began
    return took


@pytest.mark.parametrize("route", BODIES)
def test_hanging_up_cancels_the_samples(wire: Wire, whole: float, route: str) -> None:
    path, body, prompts = BODIES[route]
    wait_until(wire, 0, 60)
    connection = connect(wire, path, body)
    wait_until(wire, prompts, 60)
    connection.close()
    assert wait_until(wire, 0, 30) < max(whole / 2, 0.3)


def test_hanging_up_cancels_samples_that_are_queued(wire: Wire, whole: float) -> None:
    """The samples of ten clients wait behind one another; when all clients leave, none is drawn."""
    path, body, _ = BODIES["generate"]
    connections = [connect(wire, path, body) for _ in range(10)]
    wait_until(wire, 10, 60)
    for connection in connections:
        connection.close()
    assert wait_until(wire, 0, 30) < max(whole, 0.6)


def test_hanging_up_while_a_prompt_is_tokenized_draws_nothing(wire: Wire) -> None:
    """Prompts of one tenant are tokenized one after the other. A long conversation, which is refused in the
    end, keeps those behind it waiting, and they are given up."""
    text = "<|endoftext|>" * 330  # longer than what is tokenized at once
    chat, completions = "/v1/chat/completions", "/v1/completions"
    behind = [(completions, OPENAI | {"prompt": text}), (chat, BODIES["chat"][1])]
    assert wire.http.post(completions, json=OPENAI | {"prompt": text, "n": 1}).status_code == 200
    wait_until(wire, 0, 60)
    messages = [{"role": "user", "content": ""}] * 200_000
    first = connect(wire, chat, OPENAI | {"messages": messages})
    connections = [connect(wire, path, body) for path, body in behind]
    for connection in connections:
        connection.close()
    began = time.monotonic()
    first.settimeout(60)
    assert first.recv(12) == b"HTTP/1.1 400"
    first.close()
    while time.monotonic() - began < 2:
        assert active(wire) == 0
        time.sleep(0.05)


def test_hanging_up_while_weights_are_saved_draws_nothing(server: ServerProcess, wire: Wire) -> None:
    """The save itself is completed, and the next request samples what it has saved."""
    model = wire.model()
    path = f"tinker://{model}/weights/live"
    body = OPENAI | {"prompt": PROMPT, "model": path}
    server.engine.suspend()
    try:
        connections = [connect(wire, "/v1/completions", body) for _ in range(3)]
        time.sleep(0.5)
        assert active(wire) == 1, "the save alone"
        for connection in connections:
            connection.close()
        time.sleep(0.5)
    finally:
        server.engine.resume()
    began = time.monotonic()
    while time.monotonic() - began < 2:
        assert active(wire) <= 1
        time.sleep(0.05)
    wait_until(wire, 0, 30)
    answer = wire.http.post("/v1/completions", json=body | {"n": 1, "max_tokens": 2})
    assert answer.status_code == 200, answer.text
    model_data = wire.http.get(f"/api/v1/sessions/{model.partition(':')[0]}").json()
    assert len(model_data["sampler_ids"]) <= 1, "the weights were saved once"


def test_a_wrong_prompt_leaves_none_of_the_others(wire: Wire) -> None:
    wrong = NATIVE | {"prompts": [PROMPT, [10**6]]}
    assert wire.http.post("/api/v1/sample", json=wrong).status_code == 400
    wait_until(wire, 0, 5)


def test_a_numbered_sample_outlives_its_connection(wire: Wire, whole: float) -> None:
    """Sending it again, as after a lost connection, finds its answer."""
    made = wire.post(
        "create_sampling_session", session_id=wire.session(), sampling_session_seq_id=0, base_model="tiny"
    )
    numbered = {"sampling_session_id": made.json()["sampling_session_id"], "seq_id": 1}
    path, body, _ = BODIES["sample"]
    connection = connect(wire, path, body | numbered)
    wait_until(wire, 1, 60)
    connection.close()
    answer = wire.http.post(path, json=body | numbered)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["sequences"]) == SAMPLES
