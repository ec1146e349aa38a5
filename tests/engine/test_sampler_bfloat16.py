"""Sampling in bfloat16: decoding with copies of the weights by output, and with the weights as they are if
there is little memory; prompts with the weights as they are."""

import jax.numpy as jnp
import numpy as np
import pytest
from engine_sampling import full_forward_logprobs, load_tiny, make_sampler, random_adapter, request, run_all
from engine_sampling import sequences as sequences_of
from tinsmith.engine import processor
from tinsmith.model import decoder, kv_cache, load, lora
from tinsmith.model.cpu.weights import stored_layers
from tinsmith.model.prefill import prefill
from tinsmith.model.prefill_rows import PrefillRows


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    tiny = load_tiny(tmp_path_factory.mktemp("tiny"), "qwen3", max_position_embeddings=1024)
    graph, _ = decoder.build(tiny.config, jnp.bfloat16)
    return tiny._replace(graph=graph, base=load.load_base(tiny.folder, tiny.config, jnp.bfloat16))


def ask(model, adapter, by_output, monkeypatch):
    monkeypatch.setattr(processor, "memory_bytes", lambda: 1 << 40 if by_output else 0)
    sampler = make_sampler(model)
    sampler.register("a", adapter, scale=2.0)
    assert sampler.weights_of(None).base_by_layer.by_output == by_output
    for index, key in enumerate(("a", None)):
        prompt = np.random.default_rng(index).integers(3, 320, 40)
        sampler.add(request(index, prompt, max_tokens=30, seed=index, stop_tokens=[]), key)
    return {index: sequences_of(output)[0] for index, output in run_all(sampler).items()}


def test_both_ways_give_the_trainers_log_probs(model, monkeypatch):
    adapter = random_adapter(model.config, 1)
    for by_output in (False, True):
        for index, sampled in ask(model, adapter, by_output, monkeypatch).items():
            prompt = np.random.default_rng(int(index)).integers(3, 320, 40)
            tokens = [*prompt, *sampled.tokens]
            reference = full_forward_logprobs(model, tokens, 1.0, adapter if index == "0" else None, 2.0)
            rows = len(prompt) - 1 + np.arange(len(sampled.tokens))
            difference = np.abs(sampled.logprobs - reference[rows, sampled.tokens])
            # bfloat16 has 8 bits: activations of a few layers differ by a few of the last one
            assert difference.max() < 0.1, by_output
            assert difference.mean() < 0.02, by_output


def prompt_arguments(config):
    """Return an empty cache, and a row of 64 tokens of one prompt."""
    ones = np.arange(64, dtype=np.int32)[None]
    rows = PrefillRows(
        ones, ones, 0 * ones, 0 * ones + 1, ones, np.zeros((1, 0), np.int32), np.zeros(1, np.int32)
    )
    return kv_cache.make_cache(config, 3, 64, jnp.bfloat16), rows


def test_a_chunk_of_prompts_converts_no_stack_of_weights(model):
    """Without `stored_layers`, XLA makes float32 copies of the matrices of all layers for every chunk."""
    cache, rows = prompt_arguments(model.config)
    program = prefill.lower(model.graph, stored_layers(model.base), cache, None, rows).compile().as_text()
    for name, leaf in model.base["layers"].items():
        shape = ",".join(map(str, leaf["weight"].shape))
        assert f"u16[{shape}]" in program, name
        assert f"f32[{shape}]" not in program, name


def test_a_mixture_with_an_adapter_is_the_same_with_layers_stored_as_integers(tmp_path):
    tiny = load_tiny(tmp_path, "qwen3_moe", max_position_embeddings=1024)
    graph, _ = decoder.build(tiny.config, jnp.bfloat16)
    base = load.load_base(tiny.folder, tiny.config, jnp.bfloat16)
    stack = lora.stack_adapters((random_adapter(tiny.config, 1),), jnp.ones(1))

    def states(base):
        cache, rows = prompt_arguments(tiny.config)
        return np.asarray(prefill(graph, base, cache, stack, rows)[1])

    np.testing.assert_array_equal(states(stored_layers(base)), states(base))
