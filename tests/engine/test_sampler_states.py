"""Models with states (of delta nets, Mamba-2): prefixes, copies and preemption change no log-prob."""

import numpy as np
import pytest
from engine_sampling import (
    alone_and_together,
    full_forward_logprobs,
    load_tiny,
    make_sampler,
    request,
    run_all,
    sample,
    sequences,
)
from tinsmith.model.kv_cache import bytes_per_sequence

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module", params=["qwen3_5", "nemotron_h"])
def model(tmp_path_factory, request):
    overrides = {"hybrid_override_pattern": "ME*"} if request.param == "nemotron_h" else {}
    return load_tiny(tmp_path_factory.mktemp("states"), request.param, **overrides)


@pytest.fixture(scope="module")
def sampler(model):
    return make_sampler(model)


def assert_true_logprobs(model, prompt, sampled):
    tokens = [*prompt, *sampled.tokens]
    every = full_forward_logprobs(model, tokens)
    rows = np.arange(len(prompt) - 1, len(tokens) - 1)
    np.testing.assert_allclose(sampled.logprobs, every[rows, tokens[len(prompt) :]], atol=1e-4)


def test_a_prompt_goes_on_from_the_end_of_an_earlier_one_and_of_its_sample(model, sampler):
    prompt = RNG.integers(3, 320, 75)
    first = sample(sampler, request("first", prompt, max_tokens=21, stop_tokens=[], seed=1))
    (drawn,) = sequences(first)
    assert first.prompt_cache_hit_tokens == 0
    again = sample(sampler, request("again", prompt, max_tokens=21, stop_tokens=[], seed=1))
    assert again.prompt_cache_hit_tokens == len(prompt) - 1
    assert sequences(again)[0].tokens == drawn.tokens
    longer = np.array([*prompt, *drawn.tokens, *RNG.integers(3, 320, 30)])
    second = sample(sampler, request("second", longer, max_tokens=21, stop_tokens=[]))
    assert second.prompt_cache_hit_tokens == len(prompt) + len(drawn.tokens) - 1
    # pages alone are no prefix: no state was kept in the middle of the prompt
    other = np.array([*prompt[:50], *RNG.integers(3, 320, 30)])
    third = sample(sampler, request("third", other, max_tokens=5, stop_tokens=[]))
    assert third.prompt_cache_hit_tokens == 0
    for asked, answer in ((prompt, first), (prompt, again), (longer, second), (other, third)):
        assert_true_logprobs(model, asked, sequences(answer)[0])


def test_a_sample_that_the_host_ends_keeps_no_state(model, sampler):
    """The device does not know the ninth stop token, and goes on to the end of the chunk."""
    prompt = RNG.integers(3, 320, 40)
    (free,) = sequences(sample(sampler, request("free", prompt, max_tokens=16, stop_tokens=[], seed=3)))
    never = [token for token in range(3, 320) if token not in free.tokens][:200]
    stops = [*never, free.tokens[2]]
    ended = sample(sampler, request("ended", prompt, max_tokens=16, stop_tokens=stops, seed=3))
    (stopped,) = sequences(ended)
    at = free.tokens.index(stops[-1]) + 1
    assert stopped.tokens == free.tokens[:at]
    longer = np.array([*prompt, *stopped.tokens, 5, 6, 7])
    answer = sample(sampler, request("longer", longer, max_tokens=9, stop_tokens=[]))
    assert_true_logprobs(model, longer, sequences(answer)[0])


def test_prompts_of_one_token(model, sampler):
    """A slot may hold the state of an earlier sequence, and a new one begins with zeros."""
    for i in range(3):
        answer = sample(sampler, request(f"one {i}", [7 + i], max_tokens=9, stop_tokens=[]))
        assert_true_logprobs(model, [7 + i], sequences(answer)[0])


def test_several_samples_have_a_state_each(model, sampler):
    prompt = RNG.integers(3, 320, 37)
    drawn = sequences(sample(sampler, request("six", prompt, 6, max_tokens=18, stop_tokens=[], seed=5)))
    assert len({tuple(each.tokens) for each in drawn}) == 6
    for each in drawn:
        assert_true_logprobs(model, prompt, each)


@pytest.mark.parametrize("states", [1, 3, 16])
def test_sequences_that_share_slots_and_pages_get_what_they_get_alone(model, states):
    """Few slots for states, and fewer pages than all need: who loses them goes on as if nothing had been."""
    small = make_sampler(model, kv_cache_tokens=256, state_bytes=states * bytes_per_sequence(model.config))
    asked = [
        request(f"{states} {i}", RNG.integers(3, 320, n), 1 + i % 2, max_tokens=m, stop_tokens=[], seed=i)
        for i, (n, m) in enumerate([(60, 30), (21, 90), (90, 20), (33, 60), (5, 40)])
    ]
    alone, together, lost = alone_and_together(small, asked)
    assert [[s.tokens for s in each] for each in together] == [[s.tokens for s in each] for each in alone]
    for one, each in zip(asked, together, strict=True):
        for drawn in each:
            assert_true_logprobs(model, np.frombuffer(one.prompt, np.int32), drawn)
    assert lost or states < 16
    small._queue.start_over()
    assert small.free_pages == 256 // 16
    assert len(small._queue._states._free) == states


def test_prompt_scores_of_a_long_prompt_go_on_from_piece_to_piece(model, sampler):
    prompt = RNG.integers(3, 320, 200)
    sample(sampler, request("before", prompt[:150], max_tokens=1, stop_tokens=[]))
    answer = sample(sampler, request("scored", prompt, logprobs=True, max_tokens=1, stop_tokens=[]))
    every = full_forward_logprobs(model, prompt)
    found = np.frombuffer(answer.prompt_logprobs, np.float32)[1:]
    np.testing.assert_allclose(found, every[np.arange(199), prompt[1:]], atol=1e-4)


def test_short_prompts_share_a_program(model, sampler):
    prompts = [RNG.integers(3, 320, n) for n in (9, 30, 17, 4)]
    for i, prompt in enumerate(prompts):
        sampler.add(request(f"short {i}", prompt, max_tokens=6, stop_tokens=[]))
    answers = run_all(sampler)
    for i, prompt in enumerate(prompts):
        assert_true_logprobs(model, prompt, sequences(answers[f"short {i}"])[0])
