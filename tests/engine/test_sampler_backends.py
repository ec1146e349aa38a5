"""The sampler's programs for accelerators, run on the CPU: pages in place, scanned layers, no branches."""

import jax
import numpy as np
import pytest
from engine_sampling import load_tiny, make_sampler, random_adapter, request, run_all, sequences
from tinsmith.engine.sampling import batch_sizes
from tinsmith.engine.sampling.sampler_programs import SamplerPrograms


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    # layers with and without a sliding window
    overrides = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
    return load_tiny(tmp_path_factory.mktemp("model"), "qwen2", **overrides)


def questions(model):
    """Prompts of several chunks, filters of all kinds, penalties; more samples than slots and pages."""
    rng = np.random.default_rng(0)
    kinds = [
        {},
        {"top_k": 5},
        {"top_p": 0.8},
        {"temperature": 0.0},
        {"min_p": 0.1},
        {"presence_penalty": 0.5},
    ]
    for index, (length, params) in enumerate(zip([5, 40, 150, 20, 90, 30], kinds, strict=True)):
        prompt = rng.integers(0, model.config.vocab_size, length)
        yield request(index, prompt, 2, logprobs=True, max_tokens=12, seed=index, stop_tokens=[], **params)


def answers(model, sampler):
    sampler.register("one", random_adapter(model.config, 1))
    sampler.register("other", random_adapter(model.config, 2, rank=4))
    for index, question in enumerate(questions(model)):
        sampler.add(question, [None, "one", "other"][index % 3])
    return run_all(sampler)


@pytest.fixture(scope="module")
def expected(model):
    return answers(model, make_sampler(model))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, answer in found.items():
        for one, other in zip(sequences(answer), sequences(expected[name]), strict=True):
            assert (one.tokens, one.stop_reason) == (other.tokens, other.stop_reason)
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
        prompt, other = (np.frombuffer(each.prompt_logprobs, np.float32) for each in (answer, expected[name]))
        np.testing.assert_allclose(prompt, other, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "tpu"])
def test_samples_are_those_of_the_cpus_programs(model, expected, backend):
    assert_same(answers(model, make_sampler(model, backend=backend)), expected)


@pytest.mark.parametrize(
    "variant",
    [
        *("qwen3_moe", "gemma3_text", "qwen3_5_moe"),
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("gpt_oss", "deepseek_v3", "nemotron_h")),
    ],
)
def test_samples_of_other_families_are_those_of_the_cpus_programs(tmp_path, variant):
    model = load_tiny(tmp_path, variant)
    assert_same(answers(model, make_sampler(model, backend="reference")), answers(model, make_sampler(model)))


def test_an_adapter_that_is_not_finite_fails_alone(model):
    """Adapters of a batch are multiplied side by side: NaN in one must not reach the rows of another."""
    good, bad = random_adapter(model.config, 1), random_adapter(model.config, 2)
    jax.tree.leaves(bad["layers"])[-1].fill(np.nan)
    found = []
    for adapters in ({"good": good}, {"good": good, "bad": bad}):
        sampler = make_sampler(model, backend="reference")
        for name, adapter in adapters.items():
            sampler.register(name, adapter)
            sampler.add(request(name, [1, 2, 3], max_tokens=4, seed=0), name)
        found.append(run_all(sampler))
    alone, together = found
    assert sequences(together["good"])[0].tokens == sequences(alone["good"])[0].tokens
    assert "not finite" in together["bad"].message


@pytest.fixture
def no_memory_for(monkeypatch):
    """Makes a method of SamplerPrograms fail for batches of more than `most`; returns all sizes."""

    def limit(name, size, most):
        run, sizes = getattr(SamplerPrograms, name), []

        def limited(self, *arguments):
            sizes.append(size(*arguments))
            if sizes[-1] > most:
                self._cache.parts[0].k.delete()  # a program that fails may have taken the pages with it
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
            return run(self, *arguments)

        monkeypatch.setattr(SamplerPrograms, name, limited)
        return sizes

    return limit


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_without_memory_for_a_batch_it_goes_on_with_half(model, expected, no_memory_for, backend):
    slots = no_memory_for("decode", lambda chosen, positions, soon: len(chosen), 1)
    prompts = no_memory_for("prefill", lambda pieces: sum(count for _, count in pieces), 64)
    sampler = make_sampler(model, backend=backend, prefill_tokens=256)
    assert_same(answers(model, sampler), expected)
    assert max(slots) > 1
    assert max(prompts) > 64
    assert set(slots[slots.index(max(slots)) + 1 :]) == {1}


def test_a_batch_that_cannot_be_smaller_fails(model, no_memory_for):
    no_memory_for("decode", lambda chosen, positions, soon: len(chosen), 0)
    sampler = make_sampler(model)
    sampler.add(request("0", [1, 2, 3], max_tokens=2))
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        run_all(sampler)


def test_other_errors_are_not_tried_again(model, monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: a fault")

    monkeypatch.setattr(SamplerPrograms, "decode", fail)
    sampler = make_sampler(model)
    for index in range(2):
        sampler.add(request(index, [1, 2, 3], max_tokens=2))
    with pytest.raises(jax.errors.JaxRuntimeError, match="a fault"):
        run_all(sampler)


@pytest.mark.parametrize(
    ("backend", "gib", "sizes"),
    [
        ("cpu", 0, (64, 512, 16)),
        ("gpu", 130, (256, 4096, 32)),
        ("tpu", 31.25, (64, 2048, 32)),
        ("tpu", 95, (128, 4096, 32)),
    ],
)
def test_batches_follow_from_the_device(monkeypatch, backend, gib, sizes):
    monkeypatch.setattr(batch_sizes, "limit_bytes", lambda: int(gib * 2**30))
    assert batch_sizes.batch_sizes(backend) == sizes
