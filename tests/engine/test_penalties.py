"""Repetition, presence and frequency penalties, against a loop over the full logits."""

import itertools

import numpy as np
import pytest
from engine_sampling import (
    alone_and_together,
    full_forward_logits,
    load_tiny,
    make_sampler,
    random_adapter,
    request,
    run_all,
    sample,
    sequences,
)
from tinsmith.engine.errors import UserError

SCALE = 2.0
PROMPT = [7, 7, 30, 41, 7, 250, 3, 9, 9, 100, 101, 102]
PENALTIES = {
    "repetition": {"repetition_penalty": 1.7},
    "a reward for repetition": {"repetition_penalty": 0.6},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": -0.8},
    "all": {"repetition_penalty": 1.2, "presence_penalty": 0.7, "frequency_penalty": 0.5},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_tiny(tmp_path_factory.mktemp("tiny"), "llama", max_position_embeddings=1024)


@pytest.fixture(scope="module")
def adapter(model):
    return random_adapter(model.config, 3)


@pytest.fixture
def sampler(model, adapter):
    sampler = make_sampler(model)
    sampler.register("a", adapter, scale=SCALE)
    return sampler


def brute_force(
    logits, prompt, generated, *, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0
):
    """vLLM's definition, one token at a time."""
    z = logits.astype(np.float64)
    for token in {*prompt, *generated}:
        z[token] = z[token] / repetition_penalty if z[token] > 0 else z[token] * repetition_penalty
    for token in set(generated):
        z[token] -= frequency_penalty * generated.count(token) + presence_penalty
    return z


def penalized_logits(model, prompt, tokens, adapter, **penalties):
    """[len(tokens), V]: what each sampled token was drawn from."""
    logits = full_forward_logits(model, [*prompt, *tokens], adapter, SCALE)[len(prompt) - 1 :]
    return np.array([brute_force(logits[n], prompt, tokens[:n], **penalties) for n in range(len(tokens))])


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_tokens_and_logprobs_of_the_penalized_distribution(model, sampler, adapter, name, temperature):
    """Beside a request without penalties, over several decode chunks."""
    penalties = PENALTIES[name]
    fields = {"max_tokens": 40, "stop_tokens": [], "temperature": temperature, "seed": 5}
    sampler.add(request("plain", PROMPT, topk=3, **fields), "a")
    sampler.add(request("penalized", PROMPT, 2, topk=3, **fields, **penalties), "a")
    answers = run_all(sampler)
    drawn = {}
    for request_id, off_or_on in (("plain", {}), ("penalized", penalties)):
        for sampled, raw in zip(sequences(answers[request_id]), answers[request_id].sequences, strict=True):
            drawn[request_id] = sampled.tokens
            z = penalized_logits(model, PROMPT, sampled.tokens, adapter, **off_or_on)
            expected = log_softmax(z / (temperature or 1.0))
            np.testing.assert_allclose(sampled.logprobs, expected[np.arange(40), sampled.tokens], atol=1e-4)
            top = np.frombuffer(raw.topk.logprobs, np.float32).reshape(40, 3)
            np.testing.assert_allclose(top, -np.sort(-expected, 1)[:, :3], atol=1e-4)
            if temperature == 0.0:
                assert sampled.tokens == z.argmax(1).tolist()
    assert drawn["plain"] != drawn["penalized"]


def test_a_penalized_request_that_lost_its_pages_goes_on_as_if_nothing_had_happened(model):
    """Tokens that it drew before still count as drawn, not as prompt."""
    sampler = make_sampler(model, kv_cache_tokens=256)
    asked = [
        request(
            i,
            np.random.default_rng(i).integers(3, 320, 50),
            2,
            seed=i,
            max_tokens=60,
            stop_tokens=[],
            frequency_penalty=1.0,
        )
        for i in range(2)
    ]
    alone, together, lost = alone_and_together(sampler, asked)
    assert any(len(holder.tokens) > 50 for holder in lost), "it had generated something"
    assert [[s.tokens for s in of] for of in together] == [[s.tokens for s in of] for of in alone]


def test_values_compile_nothing_and_the_programs_without_stay_as_they_are(model):
    compiled = []
    sampler = make_sampler(model, on_compile=lambda name, seconds: compiled.append(name))
    fields = {"max_tokens": 20, "stop_tokens": []}
    sample(sampler, request(0, PROMPT, **fields))
    without = list(compiled)
    for number, (repetition, presence, frequency) in enumerate(
        itertools.product((1.0, 1.3, 0.5), (0.0, -1.0), (0.0, 2.0))
    ):
        sample(
            sampler,
            request(
                number,
                PROMPT,
                repetition_penalty=repetition,
                presence_penalty=presence,
                frequency_penalty=frequency,
                **fields,
            ),
        )
    assert not any("penalties" in name for name in without)
    assert [name for name in compiled if name not in without] == ["decode 1 slots over 192 with penalties"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -1.0},
        {"repetition_penalty": float("nan")},
        {"presence_penalty": 2.1},
        {"frequency_penalty": -2.1},
        {"frequency_penalty": float("inf")},
    ],
)
def test_values_out_of_range_are_refused_by_name(sampler, wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        sampler.add(request(0, PROMPT, **wrong))
    assert not sampler.has_work
