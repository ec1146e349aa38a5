"""Adapters: initial values, padded ranks, several adapters in one batch. PEFT's numbers: test_peft_parity."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tinsmith.model import decoder, lora

RANK = 5


@functools.partial(jax.jit, static_argnums=(0, 6))
def hidden(graph, base, tokens, position, start, stack_and_rows, remat="none"):
    return decoder.trunk(graph, base, tokens, position, start, *stack_and_rows, remat)


def random_adapter(config, seed, **options):
    """An adapter whose B is not zero, so that it changes the model; padding stays zero."""
    adapter = lora.init_lora(config, seed, RANK, **options)
    rng = np.random.default_rng(seed)

    def fill(pair):
        b = pair["b"].copy()
        b[..., :RANK, :] = 0.1 * rng.standard_normal(b[..., :RANK, :].shape)
        return pair | {"b": b}

    filled = {"layers": {name: fill(pair) for name, pair in adapter["layers"].items()}}
    return filled | ({"unembed": fill(adapter["unembed"])} if "unembed" in adapter else {})


def test_a_fresh_adapter_changes_nothing_and_is_peft_s_uniform(tiny):
    config = tiny("qwen3").config
    adapter = lora.init_lora(config, seed=7, rank=RANK)
    sites = {site.name: site for site in config.layers[0].sites}
    for name, pair in [*adapter["layers"].items(), ("unembed", adapter["unembed"])]:
        into = sites[name].into if name != "unembed" else config.hidden_size
        a = pair["a"][..., :RANK]
        assert not pair["b"].any()
        assert not pair["a"][..., RANK:].any()
        assert pair["a"].shape[-1] == 8
        assert 0.95 / into**0.5 < np.abs(a).max() <= 1 / into**0.5
        assert abs(a.std() * (3 * into) ** 0.5 - 1) < 0.15


def test_the_same_seed_gives_the_same_adapter_whatever_else_is_trained(tiny):
    config = tiny("llama").config
    whole = lora.init_lora(config, 3, 4)
    part = lora.init_lora(config, 3, 4, train_attn=False, train_unembed=False)
    assert set(part) == {"layers"}
    assert set(part["layers"]) == {"gate_proj", "up_proj", "down_proj"}
    np.testing.assert_array_equal(whole["layers"]["up_proj"]["a"], part["layers"]["up_proj"]["a"])
    assert (lora.init_lora(config, 4, 4)["unembed"]["a"] != whole["unembed"]["a"]).any()


@pytest.mark.parametrize(("rank", "bucket"), [(1, 8), (8, 8), (9, 16), (32, 32), (512, 512)])
def test_ranks_pad_to_buckets(rank, bucket):
    assert lora.pad_rank(rank) == bucket


@pytest.mark.parametrize("rank", [0, -1, 513])
def test_ranks_outside_the_buckets_are_refused(rank):
    with pytest.raises(ValueError, match="rank must be between 1 and 512"):
        lora.pad_rank(rank)


def test_an_adapter_equals_weights_with_its_product_added(tiny, packed_rows):
    model = tiny("qwen2")
    adapter = random_adapter(model.config, 0)
    stack = lora.stack_adapters((adapter,), jnp.asarray([32 / RANK]))
    merged = jax.tree.map(np.asarray, model.base)
    for name, pair in adapter["layers"].items():
        merged["layers"][name]["weight"] = (
            merged["layers"][name]["weight"] + 32 / RANK * pair["a"] @ pair["b"]
        )
    rows = packed_rows[:3]
    got = hidden(model.graph, model.base, *rows, (stack, None))
    np.testing.assert_allclose(got, hidden(model.graph, merged, *rows, (None, None)), atol=2e-4)


def test_rows_of_several_adapters_equal_each_adapter_alone(tiny, packed_rows):
    model = tiny("qwen3")
    adapters = tuple(random_adapter(model.config, seed) for seed in range(3))
    scale = jnp.asarray([32 / RANK, 1.0, 0.5])
    rows = packed_rows[:3]
    got = hidden(model.graph, model.base, *rows, (lora.stack_adapters(adapters, scale), jnp.asarray([2, 0])))
    for row, n in enumerate([2, 0]):
        alone = lora.stack_adapters(adapters[n : n + 1], scale[n : n + 1])
        expected = hidden(model.graph, model.base, *rows, (alone, None))
        np.testing.assert_allclose(got[row], expected[row], atol=2e-5)


@pytest.mark.parametrize("adapters_in_batch", [1, 2])
def test_padding_of_the_rank_gets_no_gradient(tiny, packed_rows, adapters_in_batch):
    model = tiny("llama")
    adapters = tuple(random_adapter(model.config, seed, train_unembed=False) for seed in range(2))
    adapters = adapters[:adapters_in_batch]
    scale = jnp.full(adapters_in_batch, 4.0)

    def total(adapters):
        stack = lora.stack_adapters(adapters, scale)
        row_adapter = jnp.asarray([0, adapters_in_batch - 1])
        return jnp.square(hidden(model.graph, model.base, *packed_rows[:3], (stack, row_adapter))).sum()

    for grads in jax.jit(jax.grad(total))(adapters):
        for pair in grads["layers"].values():
            assert pair["a"][..., :RANK].any()
            assert not pair["a"][..., RANK:].any()
            assert not pair["b"][..., RANK:, :].any()


def test_rematerialisation_changes_no_gradient(tiny, packed_rows):
    model = tiny("llama")
    adapter = random_adapter(model.config, 0, train_unembed=False)

    def grads(remat):
        def total(adapter, base):
            stack = lora.stack_adapters((adapter,), jnp.asarray([2.0]))
            return jnp.square(hidden(model.graph, base, *packed_rows[:3], (stack, None), remat)).sum()

        return jax.tree.leaves(jax.jit(jax.grad(total, argnums=(0, 1)))(adapter, model.base))

    plain = grads("none")
    for remat in ("dots", "attention", "full"):
        for a, b in zip(plain, grads(remat), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(a).max()))
