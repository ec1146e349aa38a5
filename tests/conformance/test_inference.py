"""Sampling beside training: `/generate` as SGLang has it, and OpenAI's completions through its client."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest
from conformance.conftest import ALICE, BOB
from conformance.server_process import ServerProcess, Wire

PROMPT = [5, 9, 77, 30, 12, 6]


@pytest.fixture(scope="module")
def alice(server: ServerProcess) -> Iterator[Wire]:
    client = Wire(server.url, ALICE)
    yield client
    client.http.close()


@pytest.fixture(scope="module")
def trained(alice: Wire) -> str:
    """The path of a sampler's weights that differ from the base model's; a sampling session names it."""
    model = alice.model()
    alice.result(alice.forward_backward(model, 1))
    alice.result(alice.optim_step(model, 2, learning_rate=0.1))
    saved = alice.result(alice.post("save_weights_for_sampler", model_id=model, seq_id=3, path="served"))
    made = alice.post("create_sampling_session", model_path=saved["path"])
    assert made.json()["success"], made.text
    return saved["path"]


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    made = openai.OpenAI(base_url=f"{server.url}/v1", api_key=ALICE, max_retries=0)
    yield made
    made.close()


def asampled(alice: Wire, **fields) -> dict:
    """The same samples by the other route."""
    body = {"prompt": {"tokens": PROMPT}} | fields
    return alice.result(alice.post("asample", **body))["sequences"][0]


def generate(alice: Wire, **body):
    answer = alice.http.post("/generate", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_generate_is_the_sampler_in_sglangs_shape(alice: Wire, trained: str) -> None:
    params = {"max_new_tokens": 6, "sampling_seed": 7, "temperature": 0.8, "top_k": 20, "ignore_eos": True}
    same = {"max_tokens": 6, "seed": 7, "temperature": 0.8, "top_k": 20, "stop": []}
    for name, of in (("served", {"model_path": trained}), (None, {"base_model": "tiny"})):
        want = asampled(alice, sampling_params=same, **of)
        got = generate(alice, input_ids=PROMPT, sampling_params=params, return_logprob=True, lora_path=name)
        assert got["output_ids"] == want["tokens"]
        meta = got["meta_info"]
        assert meta["finish_reason"] == {"type": "length", "length": 6}
        assert (meta["prompt_tokens"], meta["completion_tokens"]) == (6, 6)
        assert meta["weight_version"] == (name or "default")
        logprobs, tokens, texts = zip(*meta["output_token_logprobs"], strict=True)
        assert list(tokens) == got["output_ids"]
        np.testing.assert_allclose(logprobs, want["logprobs"], atol=1e-5)
        assert texts == (None,) * 6


def test_generate_of_several_prompts_and_of_several_samples(alice: Wire) -> None:
    params = {"max_new_tokens": 3, "temperature": 0, "ignore_eos": True}
    alone = [generate(alice, input_ids=ids, sampling_params=params) for ids in (PROMPT, PROMPT[:3])]
    both = generate(alice, input_ids=[PROMPT, PROMPT[:3]], sampling_params=params)
    assert [each["output_ids"] for each in both] == [each["output_ids"] for each in alone]
    twice = generate(alice, input_ids=PROMPT, sampling_params=params | {"n": 2})
    assert [each["output_ids"] for each in twice] == [alone[0]["output_ids"]] * 2
    scored = generate(
        alice, input_ids=PROMPT, sampling_params=params, return_logprob=True, logprob_start_len=0
    )
    given = scored["meta_info"]["input_token_logprobs"]
    assert [token for _, token, _ in given] == PROMPT
    assert given[0][0] is None
    assert all(value < 0 for value, _, _ in given[1:])


def test_a_stop_ends_the_text_before_it(alice: Wire, client: openai.OpenAI) -> None:
    params = {"max_new_tokens": 40, "sampling_seed": 3, "ignore_eos": True}
    whole = generate(alice, text="Hello", sampling_params=params)["text"]
    stop = re.findall("[ -~]{2}", whole[4:])[0]  # of a model that says anything, whole characters are few
    got = generate(alice, text="Hello", sampling_params=params | {"stop": stop})
    assert got["text"] == whole[: whole.index(stop)]
    assert got["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    streamed = client.completions.create(
        model="tiny", prompt="Hello", max_tokens=40, seed=3, stop=[stop], stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in streamed) == got["text"]


def test_completions_by_the_official_client(client: openai.OpenAI, alice: Wire, trained: str) -> None:
    for model, of in ((trained, {"model_path": trained}), ("served", {"model_path": trained})):
        done = client.completions.create(
            model=model, prompt=PROMPT, max_tokens=5, seed=11, logprobs=2, n=2, extra_body={"top_k": 30}
        )
        want = asampled(alice, sampling_params={"max_tokens": 5, "seed": 11, "top_k": 30}, **of)
        first = done.choices[0]
        assert [choice.index for choice in done.choices] == [0, 1]
        np.testing.assert_allclose(first.logprobs.token_logprobs, want["logprobs"], atol=1e-5)
        assert all(len(row) <= 2 for row in first.logprobs.top_logprobs)
        assert done.usage.prompt_tokens == len(PROMPT)
        assert done.model_extra["metadata"] == {"weight_version": "served"}
    two = client.completions.create(model="tiny", prompt=["one", "two"], max_tokens=2, temperature=0)
    assert [choice.index for choice in two.choices] == [0, 1]


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    asked = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "What is a tinsmith?"}],
        "max_tokens": 40,
        "seed": 5,
        "logprobs": True,
        "top_logprobs": 3,
        "n": 2,
    }
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert len(mine) >= 3  # 16 tokens at a time
        assert mine[0].delta.role == choice.message.role == "assistant"
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
        told = [entry for c in mine for entry in c.logprobs.content]
        assert [each.token for each in told] == [each.token for each in choice.logprobs.content]
        np.testing.assert_allclose(
            [each.logprob for each in told], [each.logprob for each in choice.logprobs.content], atol=1e-5
        )
        assert all(len(each.top_logprobs) == 3 for each in told)
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].choices == []


def test_a_chat_is_what_the_models_template_writes(
    client: openai.OpenAI, alice: Wire, tiny_model: Path
) -> None:
    """Against transformers."""
    transformers = pytest.importorskip("transformers")
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Häuser & <tags>"},
    ]
    theirs = transformers.AutoTokenizer.from_pretrained(tiny_model)
    tokens = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    greedy = {"max_tokens": 8, "temperature": 0}
    done = client.chat.completions.create(model="tiny", messages=turns, **greedy)
    assert done.usage.prompt_tokens == len(tokens)
    want = asampled(alice, base_model="tiny", prompt={"tokens": tokens}, sampling_params=greedy)
    assert done.choices[0].message.content == theirs.decode(want["tokens"], skip_special_tokens=True)


def test_generate_streams_all_there_is_so_far(alice: Wire) -> None:
    body = {
        "input_ids": PROMPT,
        "sampling_params": {"max_new_tokens": 40, "ignore_eos": True},
        "stream": True,
    }
    with alice.http.stream("POST", "/generate", json=body) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    parts = [json.loads(line) for line in lines[:-1]]
    assert len(parts) >= 3
    for earlier, later in itertools.pairwise(parts):
        assert later["output_ids"][: len(earlier["output_ids"])] == earlier["output_ids"]
        assert later["text"].startswith(earlier["text"])
    assert len(parts[-1]["output_ids"]) == 40


def test_models_are_listed_to_their_owner(client: openai.OpenAI, server: ServerProcess, trained: str) -> None:
    assert {"tiny", trained} <= {model.id for model in client.models.list()}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=BOB, max_retries=0) as bob:
        assert [model.id for model in bob.models.list()] == ["tiny"]
        for name in (trained, "served"):
            with pytest.raises(openai.NotFoundError):
                bob.completions.create(model=name, prompt="a")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="tml-wrong", max_retries=0).models.list()


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/generate", {"input_ids": PROMPT, "sampling_params": {"json_schema": "{}"}}, 422, "json_schema"),
        ("/generate", {"text": "a", "input_ids": PROMPT}, 422, "send text, or input_ids"),
        ("/generate", {"input_ids": [99999]}, 400, "outside the vocabulary"),
        ("/generate", {"input_ids": PROMPT, "lora_path": "no%"}, 404, "unknown model 'no%'"),
        ("/v1/completions", {"model": "tiny", "prompt": "a", "suffix": "b"}, 400, "suffix"),
        ("/v1/completions", {"model": "tiny", "prompt": "a", "n": 9999}, 400, "n: 9999 is over the limit"),
        ("/v1/chat/completions", {"model": "tiny", "messages": []}, 400, "messages"),
        (
            "/v1/chat/completions",
            {
                "model": "tiny",
                "messages": [{"role": "user", "content": "a"}],
                "tools": [{"type": "function"}],
            },
            400,
            "tools",
        ),
    ],
)
def test_unsupported_requests_are_refused_by_name(alice: Wire, path, body, status, message) -> None:
    answer = alice.http.post(path, json=body)
    assert answer.status_code == status, answer.text
    assert message in answer.text


def test_closing_the_connection_cancels_the_samples(alice: Wire, server: ServerProcess) -> None:
    body = {
        "input_ids": PROMPT,
        "sampling_params": {"max_new_tokens": 400, "ignore_eos": True},
        "stream": True,
    }
    for _ in range(5):  # a sample may be drawn whole before the server hears of it
        with alice.http.stream("POST", "/generate", json=body) as answer:
            next(answer.iter_lines())
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            if "sample 1 after 6 tokens: failed (user): cancelled" in server.log:
                return
            time.sleep(0.1)
    raise AssertionError("no sample was cancelled")


def test_the_engine_s_description_of_itself(alice: Wire) -> None:
    info = alice.http.get("/model_info").json()
    assert info == alice.http.get("/get_model_info").json()
    assert info["model_path"] == "tiny"
    assert alice.http.get("/server_info").json()["max_lora_rank"] == 16
