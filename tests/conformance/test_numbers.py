"""Numbers at the edges of float32, of 64 bits and beyond: the limit's value, or an error naming the field."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from conformance.conftest import ALICE
from conformance.server_process import ServerProcess, Wire

INTEGERS = ["-1", "0", *(str(sign * (1 << bits)) for bits in (31, 40, 63, 64) for sign in (1, -1)), "1" * 400]
TOKENS = [str((1 << 63) - 1), *INTEGERS]
FLOATS = ["0", "-1", "5e-324", "1e-45", "1e38", "1e39", "1e400", "0.99999999999", "NaN"]
PARAMS: dict[str, list[str]] = {
    "seed": INTEGERS,
    "top_k": INTEGERS,
    "stop_token_ids": [f"[{token}]" for token in TOKENS],
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"), FLOATS),
    "frequency_penalty": FLOATS,
}
VALUE = "the value"  # its place in a body


@pytest.fixture
def http(server: ServerProcess) -> httpx.Client:
    headers = {"Authorization": f"Bearer {ALICE}", "Content-Type": "application/json"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
        yield client


def send(http: httpx.Client, path: str, body: dict[str, Any], value: str) -> httpx.Response:
    return http.post(path, content=json.dumps(body).replace(f'"{VALUE}"', value))


def text_of(wire: Wire, answer: httpx.Response) -> str:
    """The answer, or the operation's result; never a fault of the server's."""
    asked = answer.request.content
    if answer.status_code == 200 and "request_id" in answer.json():
        result = wire.result(answer)
        assert result.get("category", "user") == "user", (asked, result)
        return json.dumps(result)
    assert answer.status_code in (200, 400, 422), (asked, answer.text)
    return answer.text


def check(
    http: httpx.Client, wire: Wire, path: str, body: dict[str, Any], name: str, values: list[str]
) -> None:
    answers = [send(http, path, body, value) for value in values]
    for value, answer in zip(values, answers, strict=True):
        text = text_of(wire, answer)
        if '"error"' in text:
            assert name in text or "token" in text or "JSON" in text, (path, body, value, text)


def test_samples(http: httpx.Client, wire: Wire) -> None:
    body = {"base_model": "tiny", "prompt": {"tokens": [5, 6]}, "num_samples": 1}
    for name, values in (PARAMS | {"max_tokens": INTEGERS, "stop": PARAMS["stop_token_ids"]}).items():
        params = {"max_tokens": 2, "stop": [2], name: VALUE}
        if name == "max_tokens":
            params["stop"] = list(range(320))
        check(http, wire, "/api/v1/asample", body | {"sampling_params": params}, name, values)
    body["sampling_params"] = {"max_tokens": 2}
    prompt = {"tokens": [5, VALUE]}
    check(http, wire, "/api/v1/asample", body | {"prompt": prompt}, "prompt", [*TOKENS, "320"])
    check(http, wire, "/api/v1/asample", body | {"num_samples": VALUE}, "num_samples", INTEGERS)


@pytest.mark.parametrize("path", ["/v1/completions", "/generate"])
def test_served_samples(http: httpx.Client, wire: Wire, path: str) -> None:
    for name, values in PARAMS.items():
        if path == "/generate":
            body: dict[str, Any] = {"model": "tiny", "input_ids": [5, 6]}
            body["sampling_params"] = {"max_new_tokens": 2, name: VALUE}
        else:
            body = {"model": "tiny", "prompt": "ab", "max_tokens": 2, name: VALUE}
        check(http, wire, path, body, name, values)
    name = "input_ids" if path == "/generate" else "prompt"
    check(http, wire, path, {"model": "tiny", name: [VALUE]}, name, TOKENS)


def test_a_stop_token_that_no_model_has_stops_nothing(http: httpx.Client, wire: Wire) -> None:
    params = {"max_tokens": 12, "temperature": 0.0}
    body = {"base_model": "tiny", "prompt": {"tokens": [5, 6]}, "num_samples": 1}
    unstopped = send(http, "/api/v1/asample", body | {"sampling_params": params | {"stop": []}}, "")
    asked = body | {"sampling_params": params | {"stop": [VALUE]}}
    answers = {token: send(http, "/api/v1/asample", asked, token) for token in TOKENS if token != "0"}
    (want,) = json.loads(text_of(wire, unstopped))["sequences"]
    for token, answer in answers.items():
        text = text_of(wire, answer)
        assert '"error"' in text or json.loads(text)["sequences"][0]["tokens"] == want["tokens"], token


def test_training(http: httpx.Client, wire: Wire) -> None:
    model = wire.model()
    inputs = {
        "target_tokens": [6, 7],
        "weights": {"data": [1.0, 1.0]},
        "logprobs": {"data": [-6.0, -6.0]},
        "advantages": {"data": [1.0, 1.0]},
    }

    def batch(loss: str = "cross_entropy", **changes: Any) -> dict[str, Any]:
        datum = {"model_input": {"tokens": [5, 6]}, "loss_fn_inputs": inputs} | changes
        return {"model_id": model, "forward_backward_input": {"data": [datum], "loss_fn": loss}}

    path = "/api/v1/forward_backward"
    targets = inputs | {"target_tokens": {"data": [6, VALUE], "dtype": "int64"}}
    check(http, wire, path, batch(loss_fn_inputs=targets), "target_tokens", [*TOKENS, "320"])
    check(http, wire, path, batch(model_input={"tokens": [5, VALUE]}), "tokens", [*TOKENS, "320"])
    weights = inputs | {"weights": {"data": [1.0, VALUE]}}
    check(http, wire, path, batch(loss_fn_inputs=weights), "weights", FLOATS)
    for loss in ("importance_sampling", "ppo", "dro"):
        for name in ("logprobs", "advantages"):
            changed = inputs | {name: {"data": [1.0, VALUE]}}
            check(http, wire, path, batch(loss, loss_fn_inputs=changed), name, FLOATS)
    steps = []
    for name in ("learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm"):
        for value in FLOATS:
            http.post(path, json=batch())
            step = {"model_id": model, "adam_params": {"learning_rate": 1e-6, name: VALUE}}
            steps.append((name, value, send(http, "/api/v1/optim_step", step, value)))
    for name, value, answer in steps:
        text = text_of(wire, answer)
        assert '"error"' not in text or name in text or "the step is not finite" in text, (name, value, text)
    assert wire.result(http.post(path, json=batch()))["metrics"]["loss:sum"] > 0


def test_adapters(http: httpx.Client, wire: Wire) -> None:
    session, numbers = wire.session(), iter(range(10**6))
    for name, values in (("rank", INTEGERS), ("seed", INTEGERS), ("alpha", FLOATS)):
        for value in values:
            body = {"session_id": session, "model_seq_id": next(numbers), "base_model": "tiny"}
            body["lora_config"] = {"rank": 4, name: VALUE}
            check(http, wire, "/api/v1/create_model", body, name, [value])
