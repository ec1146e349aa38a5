"""The chunked head against full logits and jax.grad."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tinsmith.losses.linear_logprobs import linear_logprobs, linear_logprobs_and_gradient

B, T, D, V, R = 3, 16, 12, 40, 4


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def problem(K=1, n=0, seed=0):
    rng = np.random.default_rng(seed)
    hidden, unembed = normal(rng, B, T, D), normal(rng, V, D) / 3
    targets = jnp.asarray(rng.integers(0, V, (B, T, K)), jnp.int32)
    weights = normal(rng, B, T, K)
    lora = row_adapter = None
    if n:
        lora = {"a": normal(rng, n, D, R), "b": normal(rng, n, R, V) / 3, "scale": jnp.arange(1.0, n + 1) / 2}
        row_adapter = jnp.asarray(np.arange(B) % n, jnp.int32)
    return hidden, unembed, targets, weights, lora, row_adapter


def full_logprobs(hidden, unembed, targets, lora, row_adapter):
    logits = hidden @ unembed.T
    if lora is not None:
        a, b, scale = (lora[k][row_adapter] for k in ("a", "b", "scale"))
        logits += scale[:, None, None] * ((hidden @ a) @ b)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), targets, axis=-1)


def quadratic(lp, weights):
    """A loss that is not linear: 0.5 w lp² + w lp."""
    return weights * (0.5 * lp**2 + lp), weights * (lp + 1)


@pytest.mark.parametrize(
    ("K", "n", "chunk_tokens"), [(1, 0, 12), (1, 1, 4), (4, 1, 1000), (1, 2, 12), (4, 3, 24)]
)
def test_equals_full_logits(K, n, chunk_tokens):
    hidden, unembed, targets, weights, lora, rows = problem(K, n)

    def full_loss(hidden, unembed, lora):
        return quadratic(full_logprobs(hidden, unembed, targets, lora, rows), weights)[0].sum()

    want = full_logprobs(hidden, unembed, targets, lora, rows)
    d_hidden, d_unembed = jax.grad(full_loss, (0, 1))(hidden, unembed, lora)
    got = linear_logprobs_and_gradient(
        hidden,
        unembed,
        targets,
        weights,
        quadratic,
        lora,
        rows,
        train_unembed=True,
        chunk_tokens=chunk_tokens,
    )
    np.testing.assert_allclose(got.logprobs, want, atol=2e-5)
    np.testing.assert_allclose(got.loss, quadratic(want, weights)[0].sum((1, 2)), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(got.d_hidden, d_hidden, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got.d_unembed, d_unembed, rtol=1e-4, atol=2e-4)
    if n:
        d_lora = jax.grad(full_loss, 2)(hidden, unembed, lora)
        for name in ("a", "b"):
            np.testing.assert_allclose(got.d_lora[name], d_lora[name], rtol=1e-4, atol=3e-4)
    forward_only = linear_logprobs(hidden, unembed, targets, lora, rows, chunk_tokens)
    np.testing.assert_allclose(forward_only, want, atol=2e-5)


@pytest.mark.parametrize("poison", ["slope", "hidden"])
def test_a_row_that_is_not_finite_leaves_the_other_adapters_gradients_alone(poison):
    hidden, unembed, targets, weights, lora, _ = problem(1, 2)
    rows = jnp.asarray([0, 1, 0], jnp.int32)
    clean = linear_logprobs_and_gradient(hidden, unembed, targets, weights, quadratic, lora, rows)
    if poison == "slope":
        weights = weights.at[1, 3].set(jnp.inf)
    else:
        hidden = hidden.at[1, 3].set(jnp.nan)
    got = linear_logprobs_and_gradient(hidden, unembed, targets, weights, quadratic, lora, rows)
    for name in ("a", "b"):
        np.testing.assert_array_equal(got.d_lora[name][0], clean.d_lora[name][0])
        assert not np.isfinite(got.d_lora[name][1]).all()
    assert not np.isfinite(got.loss[1])


def test_bfloat16_keeps_a_float32_softmax():
    hidden, unembed, targets, weights, _, _ = problem()
    low = [x.astype(jnp.bfloat16) for x in (hidden, unembed)]
    want = full_logprobs(*(x.astype(jnp.float32) for x in low), targets, None, None)
    got = linear_logprobs_and_gradient(*low, targets, weights, quadratic)
    assert got.logprobs.dtype == jnp.float32
    np.testing.assert_allclose(got.logprobs, want, atol=1e-4)


def test_no_array_of_tokens_by_vocabulary():
    tokens, vocab = 2 * 512, 3000
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((2, 512, D), jnp.float32),
            ((vocab, D), jnp.float32),
            ((2, 512, 1), jnp.int32),
            ((2, 512, 1), jnp.float32),
        )
    ]
    program = jax.jit(lambda h, w, t, i: linear_logprobs_and_gradient(h, w, t, i, quadratic, chunk_tokens=64))
    memory = program.lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < tokens * vocab * 4 / 3
