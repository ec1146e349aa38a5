"""The SDK's session poller: one long poll for all samples of a sampling client."""

from __future__ import annotations

import re
import threading
import time

import httpx
import pytest
import tinker
from conformance.conftest import ALICE, BOB
from conformance.server_process import ServerProcess, Wire

PROMPT = tinker.ModelInput.from_ints([5, 6, 7, 8])


def polls(server: ServerProcess, path: str) -> int:
    """Return the number of requests that the server has answered on that path."""
    text = httpx.get(f"{server.url}/metrics", headers={"X-API-Key": ALICE}).text
    found = re.findall(rf'_seconds_count{{[^}}]*"/api/v1/{path}"[^}}]*}} (\S+)', text)
    return int(sum(map(float, found)))


def test_the_sdk_waits_for_all_samples_with_one_poll(
    server: ServerProcess, service: tinker.ServiceClient
) -> None:
    sampler = service.create_sampling_client(base_model="tiny").result()
    before = polls(server, "retrieve_future"), polls(server, "retrieve_futures")
    params = tinker.SamplingParams(max_tokens=4, temperature=1.0, seed=3)
    futures = [sampler.sample(PROMPT, 1, params) for _ in range(24)]
    tokens = [future.result().sequences[0].tokens for future in futures]
    assert tokens == [tokens[0]] * 24
    assert polls(server, "retrieve_future") - before[0] == 24, (
        "each answer is fetched once, none is waited for"
    )
    assert 1 <= polls(server, "retrieve_futures") - before[1] <= 26
    with pytest.raises(tinker.APIError, match="max_tokens"):
        sampler.sample(PROMPT, 1, tinker.SamplingParams(max_tokens=-1)).result()


@pytest.fixture
def sampler(wire: Wire) -> str:
    made = wire.post(
        "create_sampling_session", session_id=wire.session(), sampling_session_seq_id=0, base_model="tiny"
    )
    return made.json()["sampling_session_id"]


def submit(wire: Wire, sampler: str, seq_id: int, max_tokens: int) -> str:
    answer = wire.post(
        "asample",
        sampling_session_id=sampler,
        seq_id=seq_id,
        prompt={"tokens": [5, 6, 7]},
        sampling_params={"max_tokens": max_tokens, "stop": []},
    )
    return answer.json()["request_id"]


def listed(wire: Wire, sampler: str, cursor: int = 0, clone: int = 0, **fields) -> tuple[dict[str, str], int]:
    """The state by request id of one poll, and its cursor."""
    target = {"type": "sampling_session", "sampling_session_id": sampler, "cloned_sampler_id": clone}
    answer = wire.post("retrieve_futures", target=target, prev_cursor=cursor, **fields).json()
    return {each["request_id"]: each["state"] for each in answer["completions"]}, answer["cursor"]


def test_a_poll_ends_with_the_first_answer_and_goes_on_from_its_cursor(wire: Wire, sampler: str) -> None:
    assert listed(wire, sampler, timeout=0) == ({}, 0)
    long = submit(wire, sampler, 0, 400)
    short = submit(wire, sampler, 1, 1)
    first, cursor = listed(wire, sampler)
    assert first == {short: "finished"}
    assert wire.poll(short).status_code == 200, "its answer is there at once"
    assert listed(wire, sampler)[0] == first, "what was not seen is listed again"
    assert listed(wire, sampler, cursor, timeout=0) == ({}, cursor)
    wire.post("cancel_future", request_id=long)
    second, last = listed(wire, sampler, cursor)
    assert second == {long: "failed"}
    assert last > cursor
    assert submit(wire, sampler, 1, 1) == short, "submitted again, it is the one answered before"
    assert short in listed(wire, sampler, last)[0]


def test_clones_have_streams_of_their_own(wire: Wire, sampler: str) -> None:
    own = submit(wire, sampler, 999_999_999, 1)
    cloned = submit(wire, sampler, 7_000_000_000, 1)
    for request in (own, cloned):
        wire.result(httpx.Response(200, json={"request_id": request}))
    assert listed(wire, sampler)[0] == {own: "finished"}
    assert listed(wire, sampler, clone=7)[0] == {cloned: "finished"}
    assert listed(wire, sampler, clone=1, timeout=0)[0] == {}
    bobs = Wire(wire.http.base_url, BOB)
    refused = bobs.post("retrieve_futures", target={"sampling_session_id": sampler})
    assert refused.status_code == 404


def test_a_waiting_poll_is_woken_by_an_answer(server: ServerProcess, wire: Wire, sampler: str) -> None:
    """Also by one to a sample that was submitted after the poll began."""
    found: list[tuple[dict[str, str], int]] = []
    waiter = threading.Thread(target=lambda: found.append(listed(Wire(server.url, ALICE), sampler)))
    began = time.monotonic()
    waiter.start()
    time.sleep(0.3)
    request = submit(wire, sampler, 0, 1)
    waiter.join()
    assert found[0][0] == {request: "finished"}
    assert time.monotonic() - began < 3.5, "an idle poll would have taken four seconds at least"


@pytest.mark.slow
def test_samples_outlive_a_kill_of_the_server(make_server) -> None:
    """The client goes on with the cursor of the server that was killed."""
    server: ServerProcess = make_server().start()
    service = tinker.ServiceClient(base_url=server.url, api_key="tml-local")
    sampler = service.create_sampling_client(base_model="tiny").result()
    params = tinker.SamplingParams(max_tokens=4, temperature=0.0)
    expected = sampler.sample(PROMPT, 1, params).result().sequences[0].tokens
    server.engine.suspend()
    waiting = [sampler.sample(PROMPT, 1, params) for _ in range(3)]
    time.sleep(0.5)
    server.kill()
    server.start()
    for future in waiting:
        assert future.result().sequences[0].tokens == expected
    assert server.stop() == 0
