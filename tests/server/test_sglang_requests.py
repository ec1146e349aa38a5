"""Requests to SGLang and its answers, without a server; tests/sglang has a real one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tinsmith.ckpt.token_bytes import TokenBytes
from tinsmith.engine import messages
from tinsmith.engine.sampling.stop import StopRule
from tinsmith.server.addresses import Allowed, host_and_port
from tinsmith.server.base_models import BaseModel, resolve
from tinsmith.server.plugins.sglang import requests
from tinsmith.server.plugins.sglang.endpoint import (
    EndpointRefused,
    Limits,
    base_model_of,
    limits_of,
    mismatch,
)
from tinsmith.server.plugins.sglang.requests import Stops
from tinsmith.server.text import of_folder
from tiny_models import EOS_ID, VOCAB_SIZE, write_model
from tokenizer_folders import write_tokenizer_folder

PROMPT = [5, 9, 77]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = write_model(tmp_path_factory.mktemp("models") / "tiny", "llama")
    return resolve(f"tiny={folder}", folder.parent, None)


def limits(**server_info) -> Limits:
    said = {"context_length": 512, "max_total_num_tokens": 8192}
    return limits_of(said | server_info, {"model_path": "/models/tiny", "weight_version": "default"})


def sample(prompt: list[int] = PROMPT, **fields) -> messages.Sample:
    asked = {
        name: fields.pop(name) for name in list(fields) if name in messages.SamplingParams.__struct_fields__
    }
    params = messages.SamplingParams(**asked)
    ref, tokens = messages.SamplerRef("tiny"), np.asarray(prompt, "<i4").tobytes()
    return messages.Sample("r", ref, tokens, 1, params, **fields)


EXACT = [
    {},
    {"max_tokens": 4, "temperature": 0.0, "top_k": 3, "top_p": 0.9},
    {"temperature": 0.5, "top_k": 20},
    {"temperature": 1.5, "top_p": 0.9, "min_p": 0.1},
    {"temperature": 1.0, "top_k": 1},
    {"stop_strings": ["x"], "stop_tokens": [7]},
    {
        "prompt_logprobs": True,
        "prompt_logprobs_last_n": 2,
        "topk_prompt_logprobs": 5,
        "topk_sample_logprobs": 3,
    },
]


@pytest.mark.parametrize("fields", EXACT)
def test_samples_that_sglang_draws_as_we_do_go_there(model: BaseModel, fields: dict) -> None:
    assert requests.why_not(sample(**fields), model, limits(), seeds=False) is None


CELLS = messages.PromptCells((2, 1), np.asarray([1, 2], "<i4").tobytes())
OTHERWISE = [
    ("seed", {"seed": 3}),
    ("temperature", {"temperature": 1e-7}),
    ("repetition_penalty", {"repetition_penalty": 1.1}),
    ("presence_penalty", {"presence_penalty": 0.5}),
    ("frequency_penalty", {"frequency_penalty": 0.5}),
    ("top_k", {"top_k": 1, "temperature": 0.5}),
    ("top_k, top_p", {"top_k": 4, "top_p": 0.5}),
    ("target_prompt_logprobs", {"prompt_targets": CELLS}),
    ("prompt_alt_tokens_k", {"prompt_alternatives": 2}),
    ("prompt_logprobs_last_n", {"prompt_logprobs": True, "prompt_logprobs_last_n": 3}),
    ("max_tokens", {"prompt": [5] * 400, "max_tokens": 100, "limit": 300}),
]


@pytest.mark.parametrize(("field", "fields"), OTHERWISE)
def test_fields_that_sglang_computes_differently_are_named(
    model: BaseModel, field: str, fields: dict
) -> None:
    fields = dict(fields)
    there = limits(context_length=fields.pop("limit", 512))
    found = requests.why_not(sample(**fields), model, there, seeds=True)
    assert found is not None
    assert field in found.partition(":")[0]


def test_support_that_depends_on_the_options_of_the_server(model: BaseModel) -> None:
    seeded, deadly = sample(seed=3), sample(seed=3, min_p=0.1)
    deterministic = limits(enable_deterministic_inference=True)
    assert requests.why_not(seeded, model, deterministic, seeds=True) is None
    assert requests.why_not(seeded, model, deterministic, seeds=False) is not None  # another engine's numbers
    assert "min_p" in str(requests.why_not(deadly, model, deterministic, seeds=True))
    untempered = replace(limits(), tempered=False)
    assert "temperature" in str(requests.why_not(sample(temperature=0.7), model, untempered, seeds=False))
    assert requests.why_not(sample(temperature=0.0), model, untempered, seeds=False) is None


def test_a_sequence_may_go_on_to_the_end_of_the_context(model: BaseModel) -> None:
    (drawing,) = requests.new_drawings(sample(), model, limits())
    assert 509 - 3 <= drawing.remaining <= 509
    assert requests.why_not(sample(prompt=[5] * 511), model, limits(), seeds=False) is not None
    assert (
        requests.why_not(sample(max_tokens=500), model, limits(context_length=256), seeds=False) is not None
    )


@pytest.mark.parametrize(
    ("stop", "tokens", "ignore_eos"),
    [
        ({}, [EOS_ID], False),
        ({"stop_tokens": []}, [], True),
        ({"stop_strings": ["x"]}, [], True),  # there are only stop strings
        ({"stop_tokens": [9, 7, 10_000]}, [7, 9], False),
        ({"stop_tokens": [7], "stop_strings": ["x", ""]}, [7], False),
    ],
)
def test_stops(model: BaseModel, stop: dict, tokens: list[int], ignore_eos: bool) -> None:
    asked = sample(**stop)
    (drawing,) = requests.new_drawings(asked, model, limits())
    params = requests.body(asked, drawing, "rid", None, None)["sampling_params"]
    assert params["stop_token_ids"] == tokens
    assert params["ignore_eos"] is ignore_eos
    assert params["stop"] == [each for each in asked.params.stop_strings if each]


@settings(deadline=None, max_examples=150)
@given(
    tokens=st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=30),
    stop_tokens=st.sets(st.integers(0, VOCAB_SIZE - 1), max_size=3),
    text=st.data(),
    longest=st.integers(1, 30),
)
def test_a_sequence_ends_where_the_embedded_sampler_ends_it(
    model: BaseModel, tokens: list[int], stop_tokens: set[int], text: st.DataObject, longest: int
) -> None:
    tokenizer = of_folder(model.folder)
    said = tokenizer.matched_text(tokens)
    begin = text.draw(st.integers(0, len(said)))
    piece = said[begin : begin + text.draw(st.integers(0, 4))]
    strings = [piece] if piece and "\ufffd" not in piece else []

    rule = StopRule(sorted(stop_tokens), strings, longest, TokenBytes.from_folder(model.folder))
    reasons = (rule.after(token) for token in tokens)
    want = next(((at + 1, reason) for at, reason in enumerate(reasons) if reason is not None), None)
    stops = Stops(frozenset(stop_tokens), tuple(strings), longest, tokenizer.matched_text)
    assert stops.end(tokens) == want


def test_a_stop_string_may_begin_with_the_space_that_the_first_token_writes(tmp_path: Path) -> None:
    tokenizer = of_folder(write_tokenizer_folder(tmp_path / "model", "pieces"))
    tokens = tokenizer.encode("Paris", add_special_tokens=False)
    assert tokenizer.decode(tokens) == "Paris"
    assert Stops(frozenset(), (" Paris",), 30, tokenizer.matched_text).end(tokens) == (len(tokens), "stop")


def answer(tokens: list[int], reason: dict, **meta) -> dict:
    entries = [[-0.5, token, None] for token in tokens]
    return {
        "output_ids": tokens,
        "meta_info": {"finish_reason": reason, "output_token_logprobs": entries} | meta,
    }


def test_a_sequence_that_ended_by_another_s_rule_goes_on(model: BaseModel) -> None:
    asked = sample(stop_tokens=[7], max_tokens=5)
    (drawing,) = requests.new_drawings(asked, model, limits())
    drawing.take(answer([11, EOS_ID], {"type": "stop", "matched": EOS_ID}), VOCAB_SIZE)
    assert drawing.reason is None
    body = requests.body(asked, drawing, "rid", None, None)
    assert body["input_ids"] == [*PROMPT, 11, EOS_ID]
    assert body["sampling_params"]["max_new_tokens"] == 3
    drawing.take(answer([12, 13, 7], {"type": "length", "length": 3}), VOCAB_SIZE)
    assert drawing.reason == "stop"  # which comes with the last token
    assert np.frombuffer(drawing.sequence().tokens, "<i4").tolist() == [11, EOS_ID, 12, 13, 7]


@pytest.mark.parametrize(
    "wrong",
    [
        answer([VOCAB_SIZE], {"type": "length"}),
        answer([], {"type": "length"}),
        answer([5], {"type": "length"}) | {"output_ids": [6]},
        answer([5], {"type": "length"}, output_token_logprobs=[[float("nan"), 5, None]]),
        answer([5], {"type": "length"}, output_token_logprobs=[[None, 5, None]]),
    ],
)
def test_answers_that_are_not_samples_are_refused(model: BaseModel, wrong: dict) -> None:
    (drawing,) = requests.new_drawings(sample(), model, limits())
    with pytest.raises(EndpointRefused):
        drawing.take(wrong, VOCAB_SIZE)


def test_our_own_kind_is_none() -> None:
    with pytest.raises(ValueError, match="max_total_num_tokens"):
        limits_of({"model_path": "tiny", "version": "0.1.0"}, {"model_path": "tiny"})


def test_the_base_model_of_a_server_is_found(model: BaseModel, tmp_path: Path) -> None:
    def of(path: str, **said) -> Limits:
        return limits_of({"context_length": 512, "max_total_num_tokens": 99} | said, {"model_path": path})

    assert base_model_of(of(str(model.folder)), [model]) == "tiny"
    assert base_model_of(of("/elsewhere", served_model_name="tiny"), [model]) == "tiny"
    assert base_model_of(of("/elsewhere"), [model]) is None
    other = write_model(tmp_path / "other", "llama", vocab_size=VOCAB_SIZE + 8, tokenizer=False)
    assert "vocab_size" in str(mismatch(of(str(other)), model, is_operators=True))
    assert mismatch(of(str(other)), model, is_operators=False) is None  # a client's text is not a path
    assert mismatch(of(str(model.folder)), model, is_operators=True) is None


def test_only_allowed_machines_are_asked() -> None:
    named = ["10.1.0.0/16", "gpu-2", "gpu-3:30001", "fd00::1", "127.0.0.5", "[fd00::2]:30002"]
    allowed = Allowed(["http://gpu-1:30000", "http://127.0.0.1:30000"], named)
    for place in [
        ("gpu-1", 30000),
        ("127.0.0.1", 30000),
        ("localhost", 30000),
        ("10.1.2.3", 80),
        ("GPU-2", 5),
        ("gpu-2.", 5),
        ("gpu-3", 30001),
        ("fd00:0::1", 8),
        ("[fd00::1]", 8),
        ("fd00::2", 30002),
        ("::ffff:10.1.2.3", 80),
        ("127.0.0.5", 80),
    ]:
        assert place in allowed, place
    for place in [
        ("gpu-1", 30001),
        ("gpu-3", 30000),
        ("10.2.0.1", 80),
        ("127.0.0.1", 5432),
        ("localhost", 5432),
        ("::1", 30000),
        ("127.8.8.8", 2),
        ("169.254.169.254", 80),
        ("localhost.example.org", 80),
        ("2130706433", 30000),
        ("127.1", 30000),
        ("0x7f000001", 30000),
        ("0.0.0.0", 30000),
        ("::", 30000),
        ("100.64.0.1", 80),
        ("192.168.0.1", 80),
        ("224.0.0.1", 80),
        ("fe80::1", 80),
        ("::ffff:10.2.0.1", 80),
        ("::ffff:169.254.169.254", 80),
        ("64:ff9b::a9fe:a9fe", 80),
        ("2002:a9fe:a9fe::", 80),
        ("fd00::2", 30003),
        ("example.org", 443),
    ]:
        assert place not in allowed, place


def test_a_wide_network_is_not_this_machine_nor_its_cloud_s_metadata() -> None:
    wide = Allowed([], ["0.0.0.0/0", "::/0"])
    for host in ("10.0.0.1", "192.168.1.1", "100.64.0.1", "93.184.216.34", "2606:2800::1", "fd00::1"):
        assert (host, 80) in wide, host
    for host in ("127.0.0.1", "::1", "169.254.169.254", "fe80::1", "224.0.0.1", "0.0.0.0", "::"):
        assert (host, 80) not in wide, host
        assert (f"::ffff:{host}", 80) not in wide, host
    assert ("localhost", 80) not in wide
    for entry, host in [
        ("127.0.0.0/8", "127.3.4.5"),
        ("169.254.0.0/16", "169.254.1.1"),
        ("localhost", "::1"),
    ]:
        assert (host, 80) in Allowed([], [entry])


@pytest.mark.parametrize(
    "url", ["ftp://a", "http://", "gpu-1:30000", "http://me:pw@a", "http://a/v1", "http://a?x"]
)
def test_urls_of_servers(url: str) -> None:
    with pytest.raises(ValueError, match="URL"):
        host_and_port(url)
