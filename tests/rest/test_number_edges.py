"""Any JSON value in any field that takes a number: a result, or an error that names the field.

The fields are those of the OpenAPI document, so that new ones are tried without being listed here.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conformance.server_process import ServerProcess, Wire
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from rest.clients import ALICE
from tinsmith.server.app import create_app
from tinsmith.server.settings import Settings

CASES = int(os.environ.get("TINSMITH_REST_CASES", "400"))
DOCUMENT = create_app(Settings(data_dir=Path("none")), []).openapi()
Path_ = tuple[str | int, ...]
VALUE = "the value"  # its place in a body
NUMBERS = [
    *("0", "-0", "-0.0", "1", "-1", "2", "0.5", "1.0", "1e0", "1e-400", "5e-324", "1e-45", "1e38", "1e39"),
    *("1e308", "1e309", "-1e309", "NaN", "Infinity", "-Infinity", "0.99999999", "1.00000001", "9" * 400),
    *(
        str(sign * ((1 << bits) + one))
        for bits in (31, 32, 53, 63, 64)
        for sign in (1, -1)
        for one in (0, -1)
    ),
    *("9" * 5000, '"1"', '"x"', '""', "null", "true", "[]", "{}", "[1]", '"\\ud800"'),
]
values = st.sampled_from(NUMBERS) | st.integers().map(str) | st.floats().map(json.dumps)

PROMPT = {"tokens": [5, 6, 7]}
SAMPLE = {"base_model": "tiny", "prompt": PROMPT, "sampling_params": {"max_tokens": 2, "stop": []}}
INPUTS = {
    "target_tokens": {"data": [6, 7], "dtype": "int64"},
    "weights": {"data": [1.0, 1.0]},
    "logprobs": {"data": [-6.0, -6.0]},
    "advantages": {"data": [1.0, 1.0]},
}
DATA = [{"model_input": {"tokens": [5, 6]}, "loss_fn_inputs": INPUTS}]
MODEL = {"model_id": "edges"}
NEW = {"base_model": "tiny", "lora_config": {"rank": 2}}
OPENAI = {"model": "tiny", "max_tokens": 2}
RLVE = {"enabled": False, "environment_list": ["chain_sum"]}
BODIES: dict[str, dict[str, Any]] = {
    "/api/v1/asample": SAMPLE,
    "/api/v1/sample": SAMPLE,
    "/generate": {"model": "tiny", "input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 2}},
    "/v1/completions": OPENAI | {"prompt": [5, 6, 7]},
    "/v1/chat/completions": OPENAI | {"messages": [{"role": "user", "content": "a"}]},
    "/api/v1/forward_backward": MODEL | {"forward_backward_input": {"data": DATA, "loss_fn": "ppo"}},
    "/api/v1/forward": MODEL | {"forward_backward_input": {"data": DATA, "loss_fn": "ppo"}},
    "/api/v1/optim_step": MODEL | {"adam_params": {"learning_rate": 1e-6}},
    "/api/v1/create_model": NEW | {"model_id": "other", "rlve_config": RLVE},
    "/api/v1/create_session": {"base_model": "tiny"},
    "/api/v1/save_weights": MODEL | {"path": "saved", "overwrite": True},
    "/api/v1/save_weights_for_sampler": MODEL,
    "/api/v1/save_weights_external": MODEL | {"path": "saved", "overwrite": True},
    "/api/v1/load_weights": MODEL | {"path": "edges"},
    "/api/v1/create_sampling_client": {"base_model": "tiny"},
    "/api/v1/create_sampling_session": {"base_model": "tiny"},
}
# What else an error may be about, where the field is not wrong by itself.
RELATED = {"token", "JSON", "finite", "rows; a prompt", "classification", "nothing to step with"}
# The names behind free keys.
KEYS = {"loss_fn_inputs": "weights", "loss_fn_config": "clip_low_threshold", "optimizer_kwargs": "momentum"}
ALTERNATIVES = {"data": "forward_backward_input", "prompts": "prompt"}


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        schema = DOCUMENT["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return schema


def numeric(schema: dict[str, Any], path: Path_ = ()) -> Iterator[Path_]:
    """The paths to all numbers of a schema; 0 stands for the first of a list."""
    schema = resolved(schema)
    for each in (each for kind in ("anyOf", "oneOf", "allOf") for each in schema.get(kind, [])):
        yield from numeric(each, path)
    if schema.get("type") in ("integer", "number"):
        yield path
    for name, inner in schema.get("properties", {}).items():
        yield from numeric(inner, (*path, name))
    if isinstance(schema.get("items"), dict):
        yield from numeric(schema["items"], (*path, 0))
    if isinstance(schema.get("additionalProperties"), dict):
        yield from numeric(schema["additionalProperties"], (*path, KEYS.get(str(path[-1]), "x")))


def fields() -> dict[str, list[Path_]]:
    """The paths of every route that takes JSON with numbers."""
    found = {}
    for path, methods in DOCUMENT["paths"].items():
        body = methods.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json")
        if body is not None and (paths := sorted(set(numeric(body["schema"])), key=str)):
            found[path] = paths
    return found


FIELDS = fields()


def placed(body: dict[str, Any], path: Path_) -> dict[str, Any]:
    """The body with `VALUE` at the path."""
    body = copy.deepcopy(body)
    if path[0] in ALTERNATIVES and (other := body.pop(ALTERNATIVES[path[0]], None)) and path[0] == "data":
        body |= other
    if path[0] == "prompt" and len(path) > 2:
        body["prompt"] = {}
    if path[0] == "target_prompt_logprobs":
        body["target_prompt_logprobs"] = {"data": [1, 2, 3], "shape": [3, 1]}
    at: Any = body
    for key, following in itertools.pairwise((*path, None)):
        inner: Any = VALUE if following is None else [] if following == 0 else {}
        if isinstance(key, int):
            if not at:
                at.append(inner)
            elif following is None or type(at[0]) is not type(inner):
                at[0] = inner
            at = at[0]
        else:
            if following is None or type(at.get(key)) is not type(inner):
                at[key] = inner
            at = at[key]
    return body


@pytest.fixture(scope="module")
def wire(rest_server: ServerProcess) -> Iterator[Wire]:
    client = Wire(rest_server.url, ALICE)
    client.http.headers["X-API-Dialect"] = "tinkercloud"
    for model in ("edges", "numbered"):
        result(client, client.post("create_model", **NEW, model_id=model))
        result(client, client.post("save_weights", model_id=model, path="edges"))
    yield client
    client.http.close()


def result(wire: Wire, submitted: httpx.Response) -> httpx.Response:
    """The answer of a submitted operation, right or wrong."""
    while (answer := wire.poll(submitted.json()["request_id"])).status_code == 408:
        pass
    return answer


def is_submit(answer: httpx.Response) -> bool:
    return answer.status_code == 200 and isinstance(answer.json(), dict) and "request_id" in answer.json()


@pytest.mark.parametrize("route", sorted(FIELDS))
def test_any_value_has_a_result_or_an_error_that_names_its_field(wire: Wire, route: str) -> None:
    """For routes without a body above, only this is tested: no value is the server's fault."""

    @settings(
        max_examples=max(6, CASES * len(FIELDS[route]) // sum(map(len, FIELDS.values()))),
        deadline=None,
        database=None,
        phases=[Phase.generate],  # what fails is short already
        suppress_health_check=list(HealthCheck),
    )
    @given(path=st.sampled_from(FIELDS[route]), value=values)
    def ask(path: Path_, value: str) -> None:
        body = placed(BODIES.get(route, {}), path)
        if path == ("seq_id",) and "model_id" in body:  # what comes after a missing number waits
            body["model_id"] = "numbered"
        content = json.dumps(body).replace(f'"{VALUE}"', value)
        answer = wire.http.post(route, content=content, headers={"Content-Type": "application/json"})
        if is_submit(answer) and body.get("model_id") != "numbered":
            answer = result(wire, answer)
        shown = (path, value[:40], answer.text[:400])
        assert answer.status_code < 500, shown
        if '"error"' in answer.text and route in BODIES:
            assert answer.json()["category"] == "user", shown
            names = {str(name) for name in path if isinstance(name, str)}
            assert any(name in answer.text for name in names | RELATED), shown

    ask()
