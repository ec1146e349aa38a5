"""Attention against a loop over queries in numpy, the mask being `start <= key <= query`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tinsmith.model.attention import attention


def loop_attention(q, k, v, start, scale):
    B, T, N, _ = q.shape
    group = N // k.shape[2]
    out = np.zeros_like(q)
    for b in range(B):
        for n in range(N):
            for i in range(T):
                seen = slice(start[b, i], i + 1)
                scores = scale * k[b, seen, n // group] @ q[b, i, n]
                weights = np.exp(scores - scores.max())
                out[b, i, n] = weights / weights.sum() @ v[b, seen, n // group]
    return out


def arrays(B, T, N, K, H, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((B, T, n, H)).astype(np.float32) for n in (N, K, K))
    return q, k, v


@pytest.mark.parametrize("T", [1, 5, 64, 129, 300])
@pytest.mark.parametrize("window", [None, 7])
def test_equals_a_loop_with_segments_and_windows(T, window):
    q, k, v = arrays(2, T, 6, 2, 8)
    i = np.arange(T)
    start = np.stack([np.where(i >= T // 3, T // 3, 0), np.zeros(T, int)])
    if window:
        start = np.maximum(start, i - window + 1)
    got = jax.jit(attention, static_argnums=4)(q, k, v, start, 0.3)
    np.testing.assert_allclose(got, loop_attention(q, k, v, start, 0.3), atol=2e-5)


def test_a_row_that_sees_no_key_gives_finite_values_and_gradients():
    q, k, v = map(jnp.asarray, arrays(1, 70, 2, 1, 8))
    start = jnp.full((1, 70), 1000)
    total = jax.value_and_grad(lambda *x: attention(*x, start, 0.3).sum(), argnums=(0, 1, 2))
    value, grads = jax.jit(total)(q, k, v)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in grads)


def test_gradients_equal_those_of_a_dense_softmax():
    q, k, v = map(jnp.asarray, arrays(2, 150, 4, 2, 8))
    start = jnp.asarray(np.where(np.arange(150) >= 80, 80, 0)[None].repeat(2, 0))
    cotangent = jax.random.normal(jax.random.key(0), q.shape)

    def dense(q, k, v):
        i = jnp.arange(150)
        visible = (i[None, None] >= start[:, :, None]) & (i <= i[:, None])
        scores = jnp.einsum("bqnh,bsnh->bnqs", q, jnp.repeat(k, 2, 2)) * 0.3
        probs = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf))
        return jnp.einsum("bnqs,bsnh->bqnh", probs, jnp.repeat(v, 2, 2))

    @jax.jit
    def gradients(q, k, v):
        ours = jax.vjp(lambda *x: attention(*x, start, 0.3), q, k, v)[1](cotangent)
        return ours, jax.vjp(dense, q, k, v)[1](cotangent)

    for a, b in zip(*gradients(q, k, v), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
