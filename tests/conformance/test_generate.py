"""`/generate`, as SGLang's clients expect it. `tests/sglang` compares it with an SGLang."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conformance.conftest import ALICE
from conformance.server_process import ServerProcess, Wire

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PROMPT = [5, 9, 77, 30, 12, 6]
GREEDY = {"temperature": 0, "max_new_tokens": 3, "ignore_eos": True}


@pytest.fixture(scope="module")
def alice(server: ServerProcess) -> Iterator[Wire]:
    client = Wire(server.url, ALICE)
    yield client
    client.http.close()


def generate(alice: Wire, **body):
    answer = alice.http.post("/generate", json={"sampling_params": GREEDY} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(alice: Wire, **body) -> list[dict]:
    with alice.http.stream(
        "POST", "/generate", json={"sampling_params": GREEDY, "stream": True} | body
    ) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.fixture(scope="module")
def scores(tiny_model: Path):
    """The log-probs after each token of a sequence, by transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)

    def score(tokens: list[int]):
        with torch.no_grad():
            return torch.log_softmax(model(torch.tensor([tokens])).logits[0], -1)

    return score


def close_to(found: list, want: list) -> None:
    """The same tokens, and nearly the same log-probs."""
    if isinstance(want, float):
        assert found == pytest.approx(want, abs=1e-4)
    elif isinstance(want, list):
        assert len(found) == len(want)
        for each, other in zip(found, want, strict=True):
            close_to(each, other)
    else:
        assert found == want


def close(entries: list, want) -> None:
    """[[log-prob, token, text], ...] against the log-probs of all tokens."""
    np.testing.assert_allclose(
        [value for value, _, _ in entries], [want[token] for _, token, _ in entries], atol=1e-4
    )


@pytest.mark.parametrize("begin", [0, 3, 5, 6, -1])
@pytest.mark.parametrize("count", [0, 3])
def test_scores_are_where_sglang_has_them(alice: Wire, scores, begin: int, count: int) -> None:
    """The first of the prompt has none, wherever they begin; without new tokens, the likely and the wanted
    ones of the next are there."""
    params = GREEDY | {"max_new_tokens": count}
    wanted = {"return_logprob": True, "top_logprobs_num": 4, "token_ids_logprob": [7, 8, 7]}
    got = generate(alice, input_ids=PROMPT, sampling_params=params, logprob_start_len=begin, **wanted)
    meta, tokens = got["meta_info"], got["output_ids"]
    assert (len(tokens), meta["completion_tokens"], meta["finish_reason"]["length"]) == (count, count, count)
    want = scores(PROMPT + tokens)
    rows = want[len(PROMPT) - 1 :][: max(count, 1)]
    assert [token for _, token, _ in meta["output_token_logprobs"]] == tokens
    for entry, row in zip(meta["output_token_logprobs"], rows, strict=False):
        close([entry], row)
    for name in ("output_top_logprobs", "output_token_ids_logprobs"):
        for entries, row in zip(meta[name], rows, strict=True):
            close(entries, row)
    given = PROMPT[begin:] if begin >= 0 else []
    assert [token for _, token, _ in meta["input_token_logprobs"]] == given
    for name in ("input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs"):
        assert len(meta[name]) == len(given)
        if given:
            first = meta[name][0]
            assert first is None or first[0] is None
        for entries, row in zip(meta[name][1:], want[max(begin, 0) :], strict=False):
            close([entries] if name == "input_token_logprobs" else entries, row)
    for row in itertools.chain(meta["input_top_logprobs"][1:], meta["output_top_logprobs"]):
        assert len(row) == 4
    for row in itertools.chain(meta["input_token_ids_logprobs"][1:], meta["output_token_ids_logprobs"]):
        assert [token for _, token, _ in row] == [7, 8, 7]


def test_texts_in_logprobs_are_those_of_single_tokens(alice: Wire, tiny_model: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    got = generate(
        alice,
        input_ids=PROMPT,
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=2,
        token_ids_logprob=[304],
        return_text_in_logprobs=True,
        return_prompt_token_ids=True,
    )
    meta = got["meta_info"]
    entries = [*meta["input_token_logprobs"], *meta["output_token_logprobs"]]
    for name in ("input_top_logprobs", "output_top_logprobs", "output_token_ids_logprobs"):
        entries += [entry for row in meta[name] if row for entry in row]
    for _, token, text in entries:
        assert text == tokenizer.decode([token])
    assert got["prompt_token_ids"] == PROMPT


def test_lists_have_an_entry_for_each_prompt(alice: Wire) -> None:
    """Each entry is as if its prompt had been sent alone."""
    short, long = GREEDY | {"max_new_tokens": 1}, GREEDY | {"max_new_tokens": 4, "n": 1}
    fields = {
        "sampling_params": [long, short],
        "return_logprob": [True, False],
        "logprob_start_len": [2, -1],
        "top_logprobs_num": [2, 0],
        "token_ids_logprob": [[5], None],
        "lora_path": [None, "tiny"],
        "rid": ["first", "second"],
    }
    prompts = [PROMPT, PROMPT[:3]]
    got = generate(alice, input_ids=prompts, **fields)
    for place, prompt in enumerate(prompts):
        alone = generate(alice, input_ids=prompt, **{name: value[place] for name, value in fields.items()})
        assert got[place]["output_ids"] == alone["output_ids"]
        together, meta = got[place]["meta_info"], alone["meta_info"]
        assert list(together) == list(meta)
        for name in meta.keys() - {"e2e_latency", "cached_tokens"}:
            close_to(together[name], meta[name])
    assert [each["meta_info"]["id"] for each in got] == ["first", "second"]
    named = generate(alice, text=["a", "b"], rid="r")
    assert [each["meta_info"]["id"] for each in named] == ["r_0", "r_1"]
    (only,) = generate(alice, input_ids=[PROMPT], sampling_params=[short])
    assert only["meta_info"]["completion_tokens"] == 1


def test_samples_of_a_prompt_stand_together(alice: Wire) -> None:
    params = {"max_new_tokens": 4, "n": 2, "sampling_seed": 5, "ignore_eos": True}
    got = generate(alice, input_ids=[PROMPT, PROMPT[:3]], sampling_params=params)
    assert [each["meta_info"]["prompt_tokens"] for each in got] == [6, 6, 3, 3]
    assert len({each["meta_info"]["id"] for each in got}) == 4
    streamed = events(alice, input_ids=[PROMPT, PROMPT[:3]], sampling_params=params)
    for index, whole in enumerate(got):
        (last,) = [each for each in streamed if each["index"] == index and each["meta_info"]["finish_reason"]]
        assert (last["text"], last["output_ids"]) == (whole["text"], whole["output_ids"])


def test_a_stream_has_the_log_probs_of_all_there_is_so_far(alice: Wire) -> None:
    params = {"max_new_tokens": 40, "ignore_eos": True}
    asked = {"input_ids": PROMPT, "sampling_params": params, "return_logprob": True, "top_logprobs_num": 2}
    streamed = events(alice, **asked)
    assert len(streamed) >= 3
    last = streamed[-1]["meta_info"]
    for each in streamed:
        meta = each["meta_info"]
        count = len(each["output_ids"])
        assert "index" not in each
        assert meta["completion_tokens"] == count
        for name in ("output_token_logprobs", "output_top_logprobs"):
            assert meta[name] == last[name][:count]
    for each in events(alice, **asked, logprob_start_len=0, token_ids_logprob=[4]):
        assert len(each["meta_info"]["input_token_logprobs"]) == 6
        assert len(each["meta_info"]["output_token_ids_logprobs"]) == len(each["output_ids"])
    (nothing,) = events(alice, input_ids=PROMPT, sampling_params={"max_new_tokens": 0})
    assert (nothing["text"], nothing["output_ids"]) == ("", [])


NOTHING = {
    "image_data": None,
    "audio_data": [],
    "return_hidden_states": False,
    "return_routed_experts": False,
    "log_metrics": True,
    "session_params": None,
    "custom_logit_processor": None,
    "token_ids_logprob": [],
    "top_logprobs_num": None,
    "return_logprob": None,
    "logprob_start_len": None,
    "rid": None,
    "lora_path": None,
    "priority": None,
}
NOTHING_OF_PARAMS = {
    "min_new_tokens": 0,
    "json_schema": None,
    "regex": "",
    "ebnf": None,
    "stop_regex": [],
    "stop": None,
    "stop_token_ids": [],
    "logit_bias": None,
    "custom_params": {},
    "beam_width": 1,
    "n": None,
    "top_k": None,
    "min_p": None,
    "spaces_between_special_tokens": True,
    "presence_penalty": None,
}


def test_fields_that_ask_for_nothing_change_nothing(alice: Wire) -> None:
    bare = generate(alice, input_ids=PROMPT)["output_ids"]
    for fields in (NOTHING, dict.fromkeys(NOTHING)):
        assert generate(alice, input_ids=PROMPT, **fields)["output_ids"] == bare
    for fields in (NOTHING_OF_PARAMS, dict.fromkeys(NOTHING_OF_PARAMS)):
        assert generate(alice, input_ids=PROMPT, sampling_params=GREEDY | fields)["output_ids"] == bare
    whole = generate(alice, input_ids=[5] * 500, sampling_params=GREEDY | {"max_new_tokens": None})
    assert len(whole["output_ids"]) == 12  # up to the model's context
    assert generate(alice, input_ids=PROMPT, sampling_params=None)["meta_info"]["completion_tokens"] <= 128


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"return_hidden_states": True}, "return_hidden_states"),
        ({"image_data": "a.png"}, "image_data"),
        ({"input_embeds": [[0.0]]}, "input_embeds"),
        ({"custom_logit_processor": "x"}, "custom_logit_processor"),
        ({"foo": 1}, "foo"),
        ({"logprob_start_len": 7, "return_logprob": True}, "logprob_start_len"),
        ({"logprob_start_len": -2}, "logprob_start_len"),
        ({"token_ids_logprob": [400], "return_logprob": True}, "token_ids_logprob"),
        ({"return_logprob": [True, False]}, "return_logprob"),
        ({"sampling_params": [GREEDY, GREEDY]}, "sampling_params"),
        ({"input_ids": [PROMPT] * 2, "sampling_params": [GREEDY, GREEDY | {"n": 2}]}, "sampling_params"),
        ({"input_ids": [PROMPT] * 2, "rid": ["a", "a"]}, "rid"),
        ({"input_ids": [PROMPT, []]}, "input_ids"),
        (
            {
                "token_ids_logprob": [4],
                "return_logprob": True,
                "sampling_params": GREEDY | {"temperature": 0.5},
            },
            "token_ids_logprob",
        ),
        *(
            ({"sampling_params": GREEDY | {name: value}}, name)
            for name, value in {
                "min_new_tokens": 2,
                "json_schema": "{}",
                "regex": "a+",
                "ebnf": "root ::= x",
                "structural_tag": "{}",
                "stop_regex": "a+",
                "logit_bias": {"4": 1.0},
                "beam_width": 2,
                "max_new_tokens": -1,
                "top_p": 0,
                "unknown": 3,
            }.items()
        ),
    ],
)
def test_unsupported_fields_are_refused_by_name(alice: Wire, fields: dict, name: str) -> None:
    answer = alice.http.post("/generate", json={"input_ids": PROMPT, "sampling_params": GREEDY} | fields)
    assert answer.status_code in (400, 422), answer.text
    assert name in answer.json()["error"].partition(": ")[0]
