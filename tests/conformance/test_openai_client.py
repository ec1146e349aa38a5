"""`/v1`, as OpenAI's client expects it: its errors, its models, its streams and its optional fields."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from conformance.conftest import ALICE
from conformance.server_process import ServerProcess, Wire

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

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
    """The path of sampler weights that a sampling session names."""
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
        ({"prompt": [-1], "echo": True}, openai.BadRequestError, "prompt", None),
        ({"prompt": [2**40], "echo": True}, openai.BadRequestError, "prompt", None),
        ({"temperature": -1}, openai.BadRequestError, "temperature", None),
        ({"n": 99_999}, openai.BadRequestError, "n", None),
        ({"best_of": 99_999}, openai.BadRequestError, "best_of", None),
        ({"prompt": [[5], [5] * 600]}, openai.BadRequestError, "prompt[1]", "context_length_exceeded"),
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
    assert raised.value.param == "messages[1].content[0].type"


def test_every_answer_under_v1_has_the_shape(server: ServerProcess, alice: Wire) -> None:
    """Also those that no route has given: without a key, of unknown paths, of bodies that are no JSON."""
    completions = "/v1/completions"
    answers = {
        401: [httpx.post(server.url + completions, json={}, headers={"X-API-Key": "tml-wrong"})],
        404: [alice.http.get("/v1/engines"), alice.http.get("/v1/models/none")],
        405: [alice.http.delete("/v1/models/tiny")],
        413: [alice.http.post(completions, content=b" " * (17 << 20))],
        400: [alice.http.post(completions, content=b"{"), alice.http.post(completions, json=[1])],
    }
    for status, found in answers.items():
        for answer in found:
            assert answer.status_code == status, answer.text
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["message"]
            assert error["type"] == "invalid_request_error"
    assert answers[401][0].json()["error"]["code"] == "invalid_api_key"
    assert answers[404][0].json()["error"]["code"] == "unknown_url"
    assert alice.http.post("/generate", json={}).json()["error"] == "send text, or input_ids"


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
    """The request's prompts would take far longer than this test waits."""
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
    """Choices are numbered as in a whole answer; log-probs and offsets go on where the last chunk ended."""
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
        assert choice.logprobs.text_offset == sorted(choice.logprobs.text_offset)
    # A busy server may send two pieces of one choice together, though hardly of all.
    assert sum(len(chunk.choices) for chunk in chunks) > len(whole.choices)
    assert chunks[-1].usage == whole.usage


# --- fields that ask for nothing, and those that are refused

NOTHING = {
    "logit_bias": {},
    "n": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "stop": [],
    "stream": False,
    "stream_options": None,
    "user": "somebody",
    "top_p": 1,
    "store": False,
    "service_tier": "auto",
    "min_tokens": 0,
    "metadata": {},
    "safety_identifier": "s",
    "prompt_cache_key": "k",
    "seed": None,
    "chat_template_kwargs": None,
}
NOTHING_OF_COMPLETIONS = NOTHING | {"echo": False, "best_of": 1, "suffix": "", "logprobs": None}
NOTHING_OF_CHATS = NOTHING | {
    "tools": [],
    "tool_choice": "none",
    "parallel_tool_calls": True,
    "functions": [],
    "function_call": "none",
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "audio": None,
    "prediction": None,
    "reasoning_effort": None,
    "verbosity": "medium",
    "web_search_options": None,
    "logprobs": False,
    "top_logprobs": 0,
    "max_completion_tokens": 2,
}
TURNS = [{"role": "user", "content": "a"}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def plain(alice: Wire, route: str, **fields) -> dict:
    answer = alice.http.post(route, json={"model": "tiny", "max_tokens": 2, "temperature": 0} | fields)
    assert answer.status_code == 200, (fields, answer.text)
    return answer.json()["choices"][0]


def test_fields_that_ask_for_nothing_change_nothing(alice: Wire) -> None:
    """Each alone, all together, and all of them null."""
    for route, base, fields in (
        ("/v1/completions", {"prompt": "a"}, NOTHING_OF_COMPLETIONS),
        ("/v1/chat/completions", {"messages": TURNS}, NOTHING_OF_CHATS),
    ):
        bare = plain(alice, route, **base)
        for name, value in fields.items():
            assert plain(alice, route, **base, **{name: value}) == bare
        assert plain(alice, route, **base, **fields) == bare
        assert plain(alice, route, **base, **dict.fromkeys(fields)) == bare
        for name in ("logit_bias", "metadata"):  # as languages without objects write an empty one
            assert plain(alice, route, **base, **{name: []}) == bare
    with_tools = {"messages": TURNS, "tools": [TOOL], "tool_choice": "none"}
    assert plain(alice, "/v1/chat/completions", **with_tools) == bare


@pytest.mark.parametrize(
    ("route", "fields", "param"),
    [
        ("/v1/completions", {"logit_bias": {"5": 3}}, "logit_bias"),
        ("/v1/completions", {"best_of": 2, "n": 3}, "best_of"),
        ("/v1/completions", {"best_of": 2, "stream": True}, "best_of"),
        ("/v1/completions", {"best_of": True}, "best_of"),
        ("/v1/completions", {"stream_options": {"include_usage": True}}, "stream_options"),
        ("/v1/completions", {"min_tokens": 1}, "min_tokens"),
        ("/v1/completions", {"max_tokens": -1}, "max_tokens"),
        ("/v1/chat/completions", {"max_tokens": 0}, "max_tokens"),
        ("/v1/chat/completions", {"store": True}, "store"),
        ("/v1/chat/completions", {"tools": [TOOL]}, "tools"),
        ("/v1/chat/completions", {"tools": [TOOL], "tool_choice": "auto"}, "tools"),
        ("/v1/chat/completions", {"tool_choice": "required"}, "tool_choice"),
        ("/v1/chat/completions", {"response_format": {"type": "json_object"}}, "response_format.type"),
        ("/v1/chat/completions", {"modalities": ["text", "audio"]}, "modalities"),
        ("/v1/chat/completions", {"reasoning_effort": "high"}, "reasoning_effort"),
        ("/v1/chat/completions", {"top_logprobs": 2}, "top_logprobs"),
        ("/v1/chat/completions", {"max_completion_tokens": 3}, "max_completion_tokens"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        (
            "/v1/chat/completions",
            {"messages": [*TURNS, {"role": "user", "content": "b", "audio": {"id": "x"}}]},
            "messages[1].audio",
        ),
        (
            "/v1/chat/completions",
            {"messages": [*TURNS, {"role": "user", "name": "bob", "content": "b"}]},
            "messages[1].name",
        ),
    ],
)
def test_unsupported_fields_are_refused_by_name(alice: Wire, route: str, fields: dict, param: str) -> None:
    base = {"model": "tiny", "prompt": "a", "messages": TURNS, "max_tokens": 2}
    del base["prompt" if "chat" in route else "messages"]
    answer = alice.http.post(route, json=base | fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


# --- history


def test_an_answers_own_message_is_history(client: openai.OpenAI, tiny_model: Path) -> None:
    """It is taken as the client's object, as its fields, and as JSON with the fields of other servers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    first = client.chat.completions.create(model="tiny", messages=TURNS, max_tokens=3)
    message = first.choices[0].message
    turns = [*TURNS, {"role": "assistant", "content": message.content}, *TURNS]
    want = len(tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"])
    others = {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None}
    others |= {"reasoning_content": None, "logprobs": None, "parsed": None, "name": None}
    for again in (message, message.model_dump(), {**message.to_dict(), **others}, {**turns[1], **others}):
        second = client.chat.completions.create(model="tiny", messages=[*TURNS, again, *TURNS], max_tokens=1)
        assert second.usage.prompt_tokens == want


def test_messages_of_every_kind(client: openai.OpenAI, tiny_model: Path) -> None:
    """The template gets all of them: the prompt has as many tokens as transformers makes of it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)

    def length(turns: list[dict]) -> int:
        done = client.chat.completions.create(model="tiny", messages=turns, max_tokens=1)
        return done.usage.prompt_tokens

    def wanted(*turns: tuple[str, str]) -> int:
        written = [{"role": role, "content": content} for role, content in turns]
        return len(tokenizer.apply_chat_template(written, add_generation_prompt=True)["input_ids"])

    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert length([{"role": "user", "content": parts}]) == wanted(("user", "one two"))
    assert length([{"role": "developer", "content": "x"}, *TURNS]) == wanted(
        ("developer", "x"), ("user", "a")
    )
    refused = {"role": "assistant", "content": None, "refusal": "I will not"}
    assert length([*TURNS, refused]) == wanted(("user", "a"), ("assistant", "I will not"))
    refused = {"role": "assistant", "content": [{"type": "refusal", "refusal": "No"}]}
    assert length([*TURNS, refused]) == wanted(("user", "a"), ("assistant", "No"))
    assert length([*TURNS, {"role": "assistant"}]) == wanted(("user", "a"), ("assistant", ""))
    told = {"role": "tool", "tool_call_id": "call_1", "name": "look", "content": "seen"}
    assert length([*TURNS, told]) == wanted(("user", "a"), ("tool", "seen"))
    called = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    with pytest.raises(openai.BadRequestError) as raised:  # the tiny model's template has no calls
        length([*TURNS, {"role": "assistant", "content": None, "tool_calls": [called]}, told])
    assert raised.value.param == "messages[1].tool_calls"


def test_variables_of_the_template(client: openai.OpenAI, alice: Wire, tiny_model: Path) -> None:
    """They are passed as in transformers; whatever they are called, none is an internal error."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    turns = [*TURNS, {"role": "assistant", "content": "It is"}]
    for fields, want in (
        ({"add_generation_prompt": False}, {}),
        ({"chat_template_kwargs": {"add_generation_prompt": False}}, {}),
        ({"continue_final_message": True}, {"continue_final_message": True}),
        ({"chat_template_kwargs": {"enable_thinking": False}}, {"add_generation_prompt": True}),
    ):
        done = client.chat.completions.create(model="tiny", messages=turns, max_tokens=1, extra_body=fields)
        assert done.usage.prompt_tokens == len(tokenizer.apply_chat_template(turns, **want)["input_ids"])
    names = ("self", "turns", "text", "tokenizer", "messages", "chat_template", "tokenize", "tools", "owner")
    for name in names:
        body = {"model": "tiny", "messages": TURNS, "max_tokens": 1, "chat_template_kwargs": {name: "x"}}
        assert alice.http.post("/v1/chat/completions", json=body).status_code in (200, 400), name


# --- echo, scores, best_of


def test_echo_scores_the_prompt(client: openai.OpenAI, tiny_model: Path) -> None:
    """This is how evaluations request log-probs: nothing is drawn. Compared with transformers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    text = "A tinsmith mends"
    ids = tokenizer(text)["input_ids"]
    with torch.no_grad():
        want = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
    scores = [want[at, token].item() for at, token in enumerate(ids[1:])]
    for prompt in (text, ids):
        done = client.completions.create(
            model="tiny", prompt=[prompt, prompt[:4]], max_tokens=0, echo=True, logprobs=3
        )
        choice = done.choices[0]
        assert (choice.text, choice.finish_reason) == (text, "length")
        assert done.usage.completion_tokens == 0
        assert choice.logprobs.token_logprobs[0] is None
        np.testing.assert_allclose(choice.logprobs.token_logprobs[1:], scores, atol=1e-4)
        assert choice.logprobs.top_logprobs[0] is None
        for row, likely in zip(want, choice.logprobs.top_logprobs[1:], strict=False):
            np.testing.assert_allclose([*likely.values()], row.topk(3).values, atol=1e-4)
        assert "".join(choice.logprobs.tokens) == text
        starts = [len(tokenizer.decode(ids[:at])) for at in range(len(ids))]
        assert choice.logprobs.text_offset == starts


def test_echo_comes_before_what_is_drawn(client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "prompt": "Once upon", "max_tokens": 20, "seed": 3, "n": 2}
    drawn = client.completions.create(**asked, logprobs=1)
    echoed = client.completions.create(**asked, logprobs=1, echo=True)
    for plain, whole in zip(drawn.choices, echoed.choices, strict=True):
        assert whole.text == "Once upon" + plain.text
        count = len(plain.logprobs.tokens)
        assert whole.logprobs.tokens[-count:] == plain.logprobs.tokens
        assert whole.logprobs.text_offset[-count:] == [
            len("Once upon") + at for at in plain.logprobs.text_offset
        ]
    for fields in ({}, {"logprobs": 1}):
        chunks = list(client.completions.create(**asked, echo=True, stream=True, **fields))
        for whole in echoed.choices:
            mine = [c for chunk in chunks for c in chunk.choices if c.index == whole.index]
            assert "".join(c.text for c in mine) == whole.text
            if fields:
                assert [x for c in mine for x in c.logprobs.text_offset] == whole.logprobs.text_offset


def test_likely_tokens_that_are_written_alike_are_all_there(client: openai.OpenAI, alice: Wire) -> None:
    """Most tokens of the tiny model are bytes that are no characters by themselves."""
    done = client.completions.create(model="tiny", prompt="Once", max_tokens=2, temperature=0, logprobs=64)
    logprobs = done.choices[0].logprobs
    scores = {"return_logprob": True, "top_logprobs_num": 64, "text": "Once"}
    greedy = {"temperature": 0, "max_new_tokens": 2}
    want = alice.http.post("/generate", json=scores | {"sampling_params": greedy}).json()["meta_info"]
    for drawn, row, rows in zip(
        logprobs.token_logprobs, logprobs.top_logprobs, want["output_top_logprobs"], strict=True
    ):
        assert max(row.values()) == pytest.approx(drawn, abs=1e-5)
        np.testing.assert_allclose([*row.values()], [value for value, _, _ in rows], atol=1e-4)


def test_the_best_of_several(client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "prompt": "Once", "max_tokens": 8, "seed": 9, "logprobs": 0}
    every = client.completions.create(**asked, n=4)
    means = {choice.text: np.mean(choice.logprobs.token_logprobs) for choice in every.choices}
    best = client.completions.create(**asked, n=2, best_of=4)
    assert [choice.text for choice in best.choices] == sorted(means, key=means.__getitem__)[:1:-1]
    assert best.usage.completion_tokens == every.usage.completion_tokens
    assert best.choices[0].logprobs.top_logprobs is None
