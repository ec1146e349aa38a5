"""What OpenAI's client expects of `/v1`: its errors, its models, its streams and its optional fields."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator

import httpx
import numpy as np
import openai
import pytest
from conformance.conftest import ALICE
from conformance.server_process import ServerProcess, Wire

PROMPT = [5, 9, 77, 30, 12, 6]


@pytest.fixture(scope="module")
def alice(server: ServerProcess) -> Iterator[Wire]:
    client = Wire(server.url, ALICE)
    yield client
    client.http.close()


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    made = openai.OpenAI(base_url=f"{server.url}/v1", api_key=ALICE, max_retries=0)
    yield made
    made.close()


@pytest.fixture(scope="module")
def path(alice: Wire) -> str:
    """Of sampler weights that a sampling session names."""
    saved = alice.result(
        alice.post("save_weights_for_sampler", model_id=alice.model(), seq_id=1, path="of-openai")
    )
    made = alice.post("create_sampling_session", model_path=saved["path"])
    assert made.json()["success"], made.text
    return saved["path"]


# --- errors


@pytest.mark.parametrize(
    ("fields", "error", "param", "code"),
    [
        ({"model": "other"}, openai.NotFoundError, "model", "model_not_found"),
        (
            {"model": "tinker://nobody:train:0/sampler_weights/x"},
            openai.NotFoundError,
            "model",
            "model_not_found",
        ),
        ({"prompt": [5] * 600}, openai.BadRequestError, "prompt", "context_length_exceeded"),
        ({"prompt": [99_999]}, openai.BadRequestError, "prompt", None),
        ({"temperature": -1}, openai.BadRequestError, "temperature", None),
        ({"n": 99_999}, openai.BadRequestError, "n", None),
        ({"suffix": "and so on"}, openai.BadRequestError, "suffix", None),
        ({"extra_body": {"guided_regex": "a+"}}, openai.BadRequestError, "guided_regex", None),
    ],
)
def test_an_error_says_what_is_wrong_where_the_client_looks(
    client: openai.OpenAI, fields: dict, error: type[openai.APIStatusError], param: str, code: str | None
) -> None:
    with pytest.raises(error) as raised:
        client.completions.create(**({"model": "tiny", "prompt": "a"} | fields))
    assert (raised.value.param, raised.value.code) == (param, code)
    assert raised.value.type == "invalid_request_error"
    said = raised.value.response.json()["error"]
    assert said["message"]
    assert said["message"] in str(raised.value)


def test_a_wrong_message_of_a_chat_is_named(client: openai.OpenAI) -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    turns = [{"role": "user", "content": "a"}, {"role": "user", "content": [picture]}]
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model="tiny", messages=turns)
    assert raised.value.param.startswith("messages[1].content")


def test_every_answer_under_v1_has_the_shape(server: ServerProcess, alice: Wire) -> None:
    """Also those that no route has given: without a key, of unknown paths, of bodies that are no JSON."""
    completions = "/v1/completions"
    answers = {
        401: [httpx.post(server.url + completions, json={}, headers={"X-API-Key": "tml-wrong"})],
        404: [alice.http.get("/v1/engines"), alice.http.get("/v1/models/none")],
        405: [alice.http.delete("/v1/models/tiny")],
        400: [alice.http.post(completions, content=b"{"), alice.http.post(completions, json=[1])],
    }
    for status, found in answers.items():
        for answer in found:
            assert answer.status_code == status, answer.text
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["message"]
            assert error["type"] == "invalid_request_error"
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    connection.putrequest("POST", completions)
    for name, value in (("X-API-Key", ALICE), ("Content-Length", str(1 << 40))):
        connection.putheader(name, value)
    connection.endheaders()
    too_large = connection.getresponse()
    assert too_large.status == 413
    assert json.loads(too_large.read())["error"]["type"] == "invalid_request_error"
    connection.close()
    assert answers[401][0].json()["error"]["code"] == "invalid_api_key"
    assert answers[404][0].json()["error"]["code"] == "unknown_url"
    assert alice.http.post("/generate", json={}).json()["error"] == "Value error, send text, or input_ids"


def test_models_are_retrieved_by_all_their_names(client: openai.OpenAI, alice: Wire, path: str) -> None:
    listed = {model.id: model for model in client.models.list()}
    assert {"tiny", path} <= set(listed)
    for name, model in listed.items():
        assert client.models.retrieve(name) == model
    assert client.models.retrieve("of-openai").id == "of-openai"
    assert alice.http.get(f"/v1/models/{path}").json()["id"] == path
    with pytest.raises(openai.NotFoundError) as raised:
        client.models.retrieve("org/other")
    assert raised.value.code == "model_not_found"


# --- several prompts


@pytest.mark.parametrize("route", ["/v1/completions", "/generate"])
def test_one_wrong_prompt_leaves_none_running(server: ServerProcess, alice: Wire, route: str) -> None:
    """Its prompts would take far longer than this test waits."""
    prompts = [PROMPT] * 6 + [[5] * 600]
    sampling = {"n": 4, "max_new_tokens": 400, "ignore_eos": True}
    bodies = {
        "/v1/completions": {"model": "tiny", "prompt": prompts, "n": 4, "max_tokens": 400},
        "/generate": {"input_ids": prompts, "sampling_params": sampling},
    }
    before = alice.http.get("/health").json()["active_requests"]
    answer = alice.http.post(route, json=bodies[route])
    assert answer.status_code == 400
    assert "600 tokens" in answer.text
    time.sleep(0.3)
    assert alice.http.get("/health").json()["active_requests"] <= before


def test_a_stream_of_several_prompts_numbers_its_choices(client: openai.OpenAI) -> None:
    """As the whole answer does, and its log-probs and offsets go on where the last chunk ended."""
    asked = {
        "model": "tiny",
        "prompt": ["Once", "upon a time"],
        "n": 2,
        "max_tokens": 40,
        "seed": 4,
        "logprobs": 1,
    }
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(c.text for c in mine) == choice.text
        assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
        for name in ("tokens", "text_offset"):
            assert [x for c in mine for x in getattr(c.logprobs, name)] == getattr(choice.logprobs, name)
        told = [x for c in mine for x in c.logprobs.token_logprobs]
        np.testing.assert_allclose(told, choice.logprobs.token_logprobs, atol=1e-5)
        assert len(mine) >= 2
        assert choice.logprobs.text_offset == sorted(choice.logprobs.text_offset)
    assert chunks[-1].usage == whole.usage
