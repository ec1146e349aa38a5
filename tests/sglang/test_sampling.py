"""Samples of every route on a real SGLang: what the embedded sampler says, of the same weights."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from conformance.server_process import ServerProcess, Wire

from .conftest import ALICE, BOB

PROMPT = [5, 9, 77, 30, 12, 6]
EOS = 2


@pytest.fixture(scope="module")
def alice(tinsmith: ServerProcess) -> Iterator[Wire]:
    client = Wire(tinsmith.url, ALICE)
    deadline = time.monotonic() + 60
    while metric(client, "tinsmith_sglang_up") != 1.0:
        assert time.monotonic() < deadline, tinsmith.log
        time.sleep(0.1)
    yield client
    client.http.close()


@pytest.fixture(scope="module")
def sessions(alice: Wire) -> dict[str, str]:
    """Sampling sessions of the base model, by who draws."""
    session = alice.session()
    made = {}
    for number, engine in enumerate(("embedded", "sglang", "auto")):
        answer = alice.post(
            "create_sampling_session",
            session_id=session,
            sampling_session_seq_id=number,
            base_model="tiny",
            sampling_engine=engine,
        )
        made[engine] = answer.json()["sampling_session_id"]
    return made


def metric(client: Wire, name: str) -> float | None:
    text = client.http.get("/metrics").text
    found = re.findall(rf"^{name}(?:_total)?{{.*}} (\S+)$", text, re.MULTILINE)
    return sum(map(float, found)) if found else None


def sampled(alice: Wire, session: str, prompt: list[int] = PROMPT, **fields: Any) -> dict:
    params = {"max_tokens": 8, "temperature": 0.0, "stop": []} | fields.pop("params", {})
    body = {"prompt": {"tokens": prompt}, "sampling_params": params, "sampling_session_id": session} | fields
    return alice.result(alice.post("asample", **body))


def by_sglang(alice: Wire, *args: Any, **fields: Any) -> dict:
    """Return a sample that SGLang has to have drawn."""
    before = metric(alice, "tinsmith_sglang_samples") or 0.0
    answer = sampled(alice, *args, **fields)
    assert metric(alice, "tinsmith_sglang_samples") == before + 1
    return answer


def likely(rows: list) -> list[list[float]]:
    return [[value for _, value in row] for row in rows if row is not None]


def equal(got: dict, want: dict) -> None:
    assert [each["tokens"] for each in got["sequences"]] == [each["tokens"] for each in want["sequences"]]
    assert [each["stop_reason"] for each in got["sequences"]] == [
        each["stop_reason"] for each in want["sequences"]
    ]
    for mine, its in zip(got["sequences"], want["sequences"], strict=True):
        np.testing.assert_allclose(mine["logprobs"], its["logprobs"], atol=1e-4)
        if "topk_sampled_logprobs" in its:
            np.testing.assert_allclose(
                likely(mine["topk_sampled_logprobs"]), likely(its["topk_sampled_logprobs"]), atol=1e-4
            )
    assert (got["prompt_logprobs"] is None) == (want["prompt_logprobs"] is None)
    if want["prompt_logprobs"] is not None:
        np.testing.assert_allclose(
            np.asarray(got["prompt_logprobs"], float), np.asarray(want["prompt_logprobs"], float), atol=1e-4
        )
    assert (got["topk_prompt_logprobs"] is None) == (want["topk_prompt_logprobs"] is None)
    if want["topk_prompt_logprobs"] is not None:
        np.testing.assert_allclose(
            likely(got["topk_prompt_logprobs"]), likely(want["topk_prompt_logprobs"]), atol=1e-4
        )


def test_greedy_samples_are_those_of_the_embedded_sampler(alice: Wire, sessions: dict[str, str]) -> None:
    """Each stop is one that the sequence comes to: where it would have gone on."""
    fields = {"prompt_logprobs": True, "topk_prompt_logprobs": 3, "topk_sample_logprobs": 4, "num_samples": 2}
    want = sampled(alice, sessions["embedded"], **fields)
    equal(by_sglang(alice, sessions["sglang"], **fields), want)
    equal(by_sglang(alice, sessions["auto"], **fields), want)
    last = {"prompt_logprobs": True, "prompt_logprobs_last_n": 2}
    equal(by_sglang(alice, sessions["sglang"], **last), sampled(alice, sessions["embedded"], **last))
    tokens = want["sequences"][0]["tokens"]
    for stop in ([tokens[3]], [tokens[7]], {"stop_token_ids": [tokens[2], EOS]}):
        params = stop if isinstance(stop, dict) else {"stop": stop}
        want = sampled(alice, sessions["embedded"], params=params)
        assert want["sequences"][0]["stop_reason"] == "stop"
        equal(by_sglang(alice, sessions["sglang"], params=params), want)


def test_stop_strings(alice: Wire, sessions: dict[str, str]) -> None:
    """A text of a hundred tokens is stopped by strings within a token, over tokens, and by none."""
    body = {
        "input_ids": PROMPT,
        "sampling_params": {"max_new_tokens": 60, "temperature": 0, "ignore_eos": True},
    }
    said = alice.http.post("/generate", json=body).json()["text"]
    strings = [*re.findall(r"[ -~]{1,3}", said)[:4], "not said"]
    for string in strings:
        params = {"max_tokens": 60, "stop": [string]}
        want = sampled(alice, sessions["embedded"], params=params)
        equal(by_sglang(alice, sessions["sglang"], params=params), want)


def test_log_probs_are_of_the_tempered_distribution(alice: Wire, sessions: dict[str, str]) -> None:
    """Against the whole distribution at temperature 1, which the embedded sampler scores."""
    params = {"temperature": 0.5, "top_k": 50, "max_tokens": 6}
    got = by_sglang(alice, sessions["sglang"], params=params, topk_sample_logprobs=3, prompt_logprobs=True)
    (sequence,) = got["sequences"]
    whole = PROMPT + sequence["tokens"]
    every = {"data": list(range(320)) * (len(whole) - 1), "shape": [len(whole) - 1, 320]}
    scored = sampled(alice, sessions["embedded"], whole, target_prompt_logprobs=every, prompt_logprobs=True)
    raw = np.reshape(scored["target_prompt_logprobs"]["data"], (-1, 320)).astype(np.float64)
    z = raw[len(PROMPT) - 1 :] / 0.5
    tempered = z - np.log(np.exp(z).sum(-1, keepdims=True))
    np.testing.assert_allclose(sequence["logprobs"], tempered[np.arange(6), sequence["tokens"]], atol=1e-4)
    top = np.sort(tempered, -1)[:, ::-1][:, :3]
    np.testing.assert_allclose(likely(sequence["topk_sampled_logprobs"]), top, atol=1e-4)
    np.testing.assert_allclose(
        got["prompt_logprobs"][1:], scored["prompt_logprobs"][1 : len(PROMPT)], atol=1e-4
    )


def test_frequencies_are_those_of_the_distribution(alice: Wire, sessions: dict[str, str]) -> None:
    """The first token, with a filter: none is outside of it, and the others are drawn as often as they are
    likely."""
    params = {"temperature": 1.0, "top_k": 4, "max_tokens": 1}
    got = by_sglang(alice, sessions["sglang"], params=params, num_samples=400, topk_sample_logprobs=4)
    drawn = [each["tokens"][0] for each in got["sequences"]]
    table = dict(got["sequences"][0]["topk_sampled_logprobs"][0])
    assert set(drawn) <= set(table)
    p = np.exp([*table.values()])
    p /= p.sum()
    counts = np.asarray([drawn.count(token) for token in table])
    assert (((counts - 400 * p) ** 2) / (400 * p)).sum() < 21.1  # chi-square, 3 degrees of freedom, p = 1e-4


def test_samples_that_sglang_cannot_draw_exactly_are_not_sent_to_it(
    alice: Wire, sessions: dict[str, str]
) -> None:
    """`auto` uses the embedded sampler; `sglang` answers with an error that names the field."""
    for field, fields in [
        ("seed", {"params": {"seed": 7, "temperature": 1.0}}),
        ("repetition_penalty", {"params": {"repetition_penalty": 1.3}}),
        ("top_k, top_p", {"params": {"top_k": 5, "top_p": 0.5, "temperature": 1.0}}),
        ("target_prompt_logprobs", {"target_prompt_logprobs": {"data": [1] * 5, "shape": [5, 1]}}),
    ]:
        before = metric(alice, "tinsmith_sglang_samples")
        auto = sampled(alice, sessions["auto"], **fields)
        assert metric(alice, "tinsmith_sglang_samples") == before
        if field != "top_k, top_p":
            equal(auto, sampled(alice, sessions["embedded"], **fields))
        body = {"prompt": {"tokens": PROMPT}, "sampling_session_id": sessions["sglang"]}
        params = {"max_tokens": 2} | fields.get("params", {})
        refused = alice.post("asample", **body | fields | {"sampling_params": params})
        assert refused.status_code == 400
        assert field in refused.json()["error"].partition(":")[0]


def test_a_session_s_metadata_says_who_draws(alice: Wire) -> None:
    """The unmodified SDK can send such metadata."""
    wrong = alice.post("create_session", user_metadata={"tinsmith_sampling_engine": "vllm"})
    assert wrong.status_code == 422
    assert "tinsmith_sampling_engine" in wrong.json()["error"]
    metadata = {"tinsmith_sampling_engine": "embedded"}
    session = alice.post("create_session", user_metadata=metadata).json()["session_id"]
    body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tiny"}
    made = alice.post("create_sampling_session", **body).json()["sampling_session_id"]
    before = metric(alice, "tinsmith_sglang_samples")
    sampled(alice, made)
    assert metric(alice, "tinsmith_sglang_samples") == before
    assert alice.http.get(f"/api/v1/samplers/{made}").json()["sampling_engine"] == "embedded"


def test_prompts_that_would_kill_sglang_are_not_sent(alice: Wire, sessions: dict[str, str]) -> None:
    for prompt in ([320], [-1], [1 << 31], [5] * 512, []):
        body = {"prompt": {"tokens": prompt}, "sampling_session_id": sessions["sglang"]}
        assert alice.post("asample", **body).status_code in (400, 422)
    by_sglang(alice, sessions["sglang"])


def test_generate_and_its_stream(alice: Wire) -> None:
    params = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": PROMPT, "sampling_params": params, "return_logprob": True, "top_logprobs_num": 2}
    before = metric(alice, "tinsmith_sglang_samples") or 0.0
    whole = alice.http.post("/generate", json=body).json()
    with alice.http.stream("POST", "/generate", json=body | {"stream": True}) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    parts = [json.loads(line) for line in lines]
    assert len(parts) > 2
    assert parts[-1]["output_ids"] == whole["output_ids"]
    assert parts[-1]["text"] == whole["text"]
    for part in parts:
        assert whole["output_ids"][: len(part["output_ids"])] == part["output_ids"]
    assert metric(alice, "tinsmith_sglang_samples") == before + 2


def test_openai_s_client(alice: Wire, tinsmith: ServerProcess) -> None:
    before = metric(alice, "tinsmith_sglang_samples") or 0.0
    with openai.OpenAI(base_url=f"{tinsmith.url}/v1", api_key=ALICE, max_retries=0) as client:
        asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 5, "temperature": 0, "logprobs": 1}
        whole = client.completions.create(**asked, n=2)
        chunks = [*client.completions.create(**asked, n=2, stream=True)]
    for index in (0, 1):
        streamed = "".join(c.choices[0].text for c in chunks if c.choices[0].index == index)
        assert streamed == whole.choices[index].text
    assert metric(alice, "tinsmith_sglang_samples") == before + 2


def test_a_cancelled_sample_ends_there_too(alice: Wire, sessions: dict[str, str], sglang: Any) -> None:
    params = {"max_tokens": 450, "temperature": 1.0, "stop": []}
    body = {
        "prompt": {"tokens": PROMPT},
        "sampling_params": params,
        "sampling_session_id": sessions["sglang"],
    }
    asked = alice.post("asample", **body)
    time.sleep(0.5)
    alice.post("cancel_future", request_id=asked.json()["request_id"])
    answer = alice.poll(asked.json()["request_id"])
    assert answer.json()["error"] == "cancelled"
    deadline = time.monotonic() + 3
    while httpx.post(f"{sglang.url}/flush_cache").status_code != 200:  # refused while it computes
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_hanging_up_ends_a_sample_there_too(alice: Wire, sessions: dict[str, str], sglang: Any) -> None:
    asked = {
        "model": sessions["sglang"],
        "input_ids": PROMPT,
        "sampling_params": {"max_new_tokens": 450, "ignore_eos": True},
    }
    with pytest.raises(httpx.ReadTimeout):
        alice.http.post("/generate", json=asked, timeout=0.5)
    deadline = time.monotonic() + 3
    while httpx.post(f"{sglang.url}/flush_cache").status_code != 200:  # refused while it computes
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_difference_of_its_log_probs_is_reported(alice: Wire) -> None:
    """It is measured for a sampler's first sample, and so for weights that nobody has sampled before."""
    session = alice.session()
    saving = alice.post("save_weights_for_sampler", model_id=alice.model(session), seq_id=1, path="compared")
    sampler = alice.post(
        "create_sampling_session",
        session_id=session,
        sampling_session_seq_id=0,
        model_path=alice.result(saving)["path"],
        sampling_engine="sglang",
    ).json()["sampling_session_id"]
    sampled(alice, sampler, params={"temperature": 1.0})
    deadline = time.monotonic() + 10
    while (found := alice.http.get(f"/api/v1/samplers/{sampler}").json()["metrics"]) is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert abs(found["sampler/kl"]) <= found["sampler/logprob_difference"] <= 1e-4
    assert found["sampler/tokens_compared"] >= 7
    assert abs(metric(alice, "tinsmith_sampler_kl") or 1.0) <= 1e-4


def test_a_tenant_s_own_server(alice: Wire, tinsmith: ServerProcess, sglang: Any) -> None:
    """It serves that tenant alone, and only if the operator allows it; a server that is something else is
    refused."""
    bob = Wire(tinsmith.url, BOB)
    with bob.http:
        here = {"host": "127.0.0.1", "port": sglang.port}
        for wrong, why in [
            ({"host": "10.0.0.2", "port": 30000}, "--sglang-allow"),
            ({"host": "127.0.0.1", "port": 9}, "not a usable SGLang server"),
            (here, "already"),  # the operator's
        ]:
            refused = bob.http.post("/add_inference_endpoint", json=wrong).json()
            assert not refused["success"]
            assert why in refused["message"]
        mine = {"host": "localhost", "port": sglang.port, "api_key": "sk-secret", "pool": "mine"}
        added = bob.http.post("/add_inference_endpoint", json=mine)
        assert added.json()["success"], added.text
        listed = bob.http.get("/list_inference_endpoints")
        (endpoint,) = listed.json()["endpoints"]
        assert (endpoint["host"], endpoint["pool"], endpoint["base_model"]) == ("localhost", "mine", "tiny")
        assert endpoint["server_info"]["context_length"]
        assert "sk-secret" not in added.text + listed.text
        assert alice.http.get("/list_inference_endpoints").json()["endpoints"] == []
        assert bob.http.post("/remove_inference_endpoint", json=mine).json()["success"]
