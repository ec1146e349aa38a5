"""Random mixes of requests: each is answered as if it were alone, and none of them compiles anything."""

from collections import Counter

import numpy as np
import pytest
from engine_sampling import load_tiny, make_sampler, random_adapter, request, run_all, sample, sequences
from hypothesis import given, settings
from hypothesis import strategies as st
from tinsmith.engine import messages
from tinsmith.model import decode, kv_cache, prefill

KEYS = (None, "a", "b", "full")
CAPACITY = 704  # of the KV cache: less than four long requests need


@pytest.fixture(scope="module")
def new_sampler(tmp_path_factory):
    model = load_tiny(
        tmp_path_factory.mktemp("tiny"), "qwen3", num_hidden_layers=1, max_position_embeddings=256
    )
    adapters = {key: random_adapter(model.config, seed) for seed, key in enumerate(("a", "b"))}
    full = {**model.base, "norm": {"weight": model.base["norm"]["weight"] * 0.8}}

    def new(**options):
        sampler = make_sampler(model, kv_cache_tokens=CAPACITY, **options)
        for key, adapter in adapters.items():
            sampler.register(key, adapter, scale=2.0)
        sampler.register("full", base=full)
        return sampler

    return new


@pytest.fixture(scope="module")
def alone(new_sampler):
    return new_sampler()


prompts = st.builds(  # some share their beginnings
    lambda length, seed: np.random.default_rng(seed).integers(3, 320, length).tolist(),
    st.sampled_from([1, 2, 16, 17, 33, 64, 65]) | st.integers(1, 190),
    st.integers(0, 3),
)
parameters = st.fixed_dictionaries(
    {
        "max_tokens": st.integers(1, 60),
        "seed": st.integers(0, 2**64 - 1),
        "temperature": st.sampled_from([0.0, 0.7, 1.0, 1.5]),
    },
    optional={
        "top_k": st.sampled_from([1, 5, 100]),
        "top_p": st.sampled_from([0.5, 0.9]),
        "min_p": st.sampled_from([0.05, 0.3]),
        "stop_tokens": st.lists(st.integers(0, 319), max_size=12),
        "stop_strings": st.sampled_from([["a"], ["th", " "], ["never said"]]),
        "repetition_penalty": st.sampled_from([0.8, 1.3]),
        "presence_penalty": st.sampled_from([-0.5, 1.5]),
        "frequency_penalty": st.sampled_from([-0.2, 0.6]),
    },
)
questions = st.fixed_dictionaries(
    {"num_samples": st.integers(1, 4), "logprobs": st.booleans(), "topk": st.sampled_from([0, 3])}
)
arrivals = st.tuples(
    st.sampled_from(KEYS),
    prompts,
    parameters,
    questions,
    st.integers(0, 3),  # steps until the next one arrives
    st.none() | st.integers(0, 12),  # steps until it is cancelled
)


@settings(max_examples=12, derandomize=True, database=None, deadline=None)
@given(mix=st.lists(arrivals, min_size=3, max_size=7))
def test_a_request_in_a_crowd_is_the_request_alone(new_sampler, alone, mix):
    crowd = new_sampler(prefill_tokens=256)  # four prompts that go on from cached beginnings share a program
    asked, cancels, answers = [], {}, {}

    def step():
        answers.update((answer.request_id, answer) for answer in crowd.step())
        for request_id in [r for r, left in cancels.items() if left == 0]:
            crowd.cancel(request_id)
        cancels.update({request_id: left - 1 for request_id, left in cancels.items()})

    for number, (key, prompt, fields, question, pause, cancelled) in enumerate(mix):
        one = request(number, prompt, **question, **fields)
        crowd.add(one, key)
        asked.append((one, key))
        if cancelled is not None:
            cancels[one.request_id] = cancelled
        for _ in range(pause):
            step()
    while crowd.has_work:
        step()
    assert crowd._pool.num_free == CAPACITY // 16, "every page came back"
    for one, key in asked:
        if one.request_id not in answers:
            assert one.request_id in cancels
            continue
        answer = answers[one.request_id]
        assert isinstance(answer, messages.Done), answer
        expected = sample(alone, one, key)
        for ours, theirs in zip(sequences(answer.output), sequences(expected), strict=True):
            assert ours.tokens == theirs.tokens
            assert ours.stop_reason == theirs.stop_reason
            np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-4)
        if one.prompt_logprobs:
            np.testing.assert_allclose(
                *(np.frombuffer(o.prompt_logprobs, np.float32) for o in (answer.output, expected)), atol=1e-4
            )


def warm_up(sampler):
    """Every number of slots with every number of adapters, with penalties and without."""
    for keys in ("", "a", "--", "aa", "ab", "----", "aaaa", "aabb", "-aab"):
        for penalty in (0.0, 1.0):
            for number, key in enumerate(keys or "-"):
                fields = {"max_tokens": 50, "stop_tokens": [], "presence_penalty": penalty}
                prompt = np.arange(3, 80)  # longer than a prefill chunk
                key = None if key == "-" else key
                sampler.add(request(number, prompt, logprobs=True, **fields), key)
            run_all(sampler)
    sampler.add(request("copies", np.arange(3, 24), 2, max_tokens=1))
    run_all(sampler)


def test_200_random_requests_compile_nothing_after_warm_up(new_sampler):
    programs = (prefill.prefill, decode.decode, prefill.score, kv_cache.copy_pages)
    reported = []
    sampler = new_sampler(on_compile=lambda name, seconds: reported.append(name))
    warm_up(sampler)
    before, count = [program._cache_size() for program in programs], len(reported)
    kinds = Counter(name.split()[0] for name in reported)
    # 1 and 4 slots with as many adapters as fit, penalties or not; prompts from the start or going on
    assert (kinds["decode"], kinds["prefill"]) == ((2 + 2 + 1 + 1) * 2, 2 * 2)

    rng = np.random.default_rng(5)
    for number in range(200):
        sampler.add(
            request(
                number,
                rng.integers(3, 320, int(rng.integers(1, 150))),
                int(rng.integers(1, 5)),
                logprobs=bool(rng.integers(2)),
                topk=int(rng.choice([0, 3])),
                max_tokens=int(rng.integers(1, 40)),
                temperature=float(rng.choice([0.0, 0.5, rng.uniform(0, 2)])),
                top_k=int(rng.choice([-1, 5, 100])),
                top_p=float(rng.choice([1.0, rng.uniform(0.1, 1)])),
                min_p=float(rng.choice([0.0, rng.uniform(0, 0.5)])),
                presence_penalty=float(rng.choice([0.0, rng.uniform(-2, 2)])),
                repetition_penalty=float(rng.choice([1.0, rng.uniform(0.5, 2)])),
                stop_tokens=None if rng.integers(2) else rng.integers(0, 320, 12).tolist(),
            ),
            KEYS[rng.integers(len(KEYS))],
        )
        for _ in range(int(rng.integers(4))):
            sampler.step()
    run_all(sampler)
    assert [program._cache_size() for program in programs] == before
    assert reported[count:] == []
