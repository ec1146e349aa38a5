"""Weights laid out for decoding are the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import random_adapter
from tinsmith.model import decoder, lora
from tinsmith.model.cpu import weights
from tinsmith.model.folder import read_config
from tinsmith.model.kernels.product import by_output as product_by_output
from tiny_models import write_model


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [(1, 1), (5, 1), (2, 3)])
def test_products_by_output(rows, dtype):
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((*rows, 48), (20, 48)))
    product = jax.jit(product_by_output)(x, w)
    assert product.dtype == jnp.float32
    expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    np.testing.assert_allclose(product, expected, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("by_output", [False, True])
def test_opened_layers_compute_what_the_stack_does(tmp_path, by_output, tied):
    write_model(tmp_path, "qwen2", tie_word_embeddings=tied)
    config = read_config(tmp_path)
    graph, _ = decoder.build(config, jnp.float32)
    base = decoder.random_base(config, jnp.float32)
    by_layer = weights.base_by_layer(base, config, by_output)
    x_BTD = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, config.hidden_size)), jnp.float32)

    @jax.jit
    def run(base):
        opened = weights.open_layers(graph, base)
        at = opened.model.rotations(jnp.arange(3)[None].repeat(2, axis=0))
        x = x_BTD
        for block in opened.blocks:
            x = block(x, at, lambda q, k, v: q)
        return product_by_output(x, opened.head_VD)

    np.testing.assert_allclose(run(by_layer), run(base), atol=1e-5, rtol=1e-5)
    assert len(by_layer.layers) == config.num_layers
    shape = (config.hidden_size, config.layers[1].mlp.width)
    assert by_layer.layers[1]["up_proj"]["weight"].shape == (shape[::-1] if by_output else shape)


def test_gradients_of_an_adapter_are_the_same_with_layers_stored_as_integers(tmp_path):
    write_model(tmp_path, "qwen2")
    config = read_config(tmp_path)
    graph, _ = decoder.build(config, jnp.bfloat16)
    base = decoder.random_base(config, jnp.bfloat16)
    tokens = jnp.arange(3, 35)[None]
    position = jnp.arange(32)[None]

    @jax.jit
    def run(base, adapter):
        def hidden(adapter):
            stack = lora.stack_adapters((adapter,), jnp.ones(1))
            return decoder.trunk(graph, base, tokens, position, 0 * position, stack, None, "dots")

        out, pull = jax.vjp(hidden, adapter)
        return out, *pull(out)

    adapter = random_adapter(config, 0, train_unembed=False)
    stored = weights.stored_layers(base)
    assert {leaf.dtype for leaf in jax.tree.leaves(stored["layers"])} == {jnp.dtype(jnp.uint16)}
    for a, b in zip(*(jax.tree.leaves(run(each, adapter)) for each in (base, stored)), strict=True):
        np.testing.assert_array_equal(a, b)
