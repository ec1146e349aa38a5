"""Attention against a loop over queries in numpy, the mask being `start <= key <= query`."""

from functools import partial
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from tinsmith.model.decoder import REMAT_POLICIES
from tinsmith.model.kernels.attention import KERNELS, attention, reference, tpu, why_reference

BACKENDS = ["cpu", "reference"]


def loop_attention(q, k, v, start, scale, sinks=None):
    B, T, N, _ = q.shape
    group = N // k.shape[2]
    out = np.zeros_like(q)
    for b in range(B):
        for n in range(N):
            for i in range(T):
                seen = slice(start[b, i], i + 1)
                scores = scale * k[b, seen, n // group] @ q[b, i, n]
                top = scores.max() if sinks is None else max(scores.max(), sinks[n])
                weights = np.exp(scores - top)
                total = weights.sum() + (0 if sinks is None else np.exp(sinks[n] - top))
                out[b, i, n] = weights / total @ v[b, seen, n // group]
    return out


def dense_attention(q, k, v, start, scale, sinks=None):
    """The same with all scores at once, for JAX's own derivative."""
    B, T, N, _ = q.shape
    i = jnp.arange(T)
    visible = (i[None, None] >= start[:, :, None]) & (i <= i[:, None])
    scores = jnp.einsum("bqnh,bsnh->bnqs", q, jnp.repeat(k, N // k.shape[2], 2)) * scale
    scores = jnp.where(visible[:, None], scores, -jnp.inf)
    if sinks is not None:
        scores = jnp.concatenate([scores, jnp.broadcast_to(sinks[:, None, None], (B, N, T, 1))], -1)
    probs = jax.nn.softmax(scores)[..., :T]
    return jnp.einsum("bnqs,bsnh->bqnh", probs, jnp.repeat(v, N // v.shape[2], 2))


def arrays(B, T, N, K, H, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((B, T, n, H)).astype(np.float32) for n in (N, K, K))
    return q, k, v


def packed(B, T, *borders):
    """The `start` of rows with segments that begin at 0 and at `borders`; the last row is one segment."""
    start = np.zeros((B, T), int)
    for border in borders:
        start[:-1, border:] = border
    return start


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("T", [1, 5, 64, 129, 300])
@pytest.mark.parametrize("window", [None, 7])
def test_equals_a_loop_with_segments_and_windows(backend, T, window):
    q, k, v = arrays(2, T, 6, 2, 8)
    start = packed(2, T, T // 3)
    seen = start if window is None else np.maximum(start, np.arange(T) - window + 1)
    got = jax.jit(lambda *x: attention(*x, 0.3, window=window, backend=backend))(q, k, v, start)
    np.testing.assert_allclose(got, loop_attention(q, k, v, seen, 0.3), atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_sees_no_key_gives_finite_values_and_gradients(backend):
    q, k, v = map(jnp.asarray, arrays(1, 70, 2, 1, 8))
    start = jnp.full((1, 70), 1000)
    total = jax.value_and_grad(lambda *x: attention(*x, start, 0.3, backend=backend).sum(), argnums=(0, 1, 2))
    value, grads = jax.jit(total)(q, k, v)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_sinks", [False, True])
def test_outputs_and_gradients_equal_those_of_a_dense_softmax(backend, with_sinks):
    q, k, v = map(jnp.asarray, arrays(2, 150, 4, 2, 8))
    sinks = jnp.asarray([-1.0, 0.0, 2.0, 5.0]) if with_sinks else None
    start = jnp.asarray(packed(2, 150, 30, 80))
    cotangent = jax.random.normal(jax.random.key(0), q.shape)

    @jax.jit
    def both(*inputs):
        def ours(q, k, v, sinks):
            return attention(q, k, v, start, 0.3, sinks_N=sinks, backend=backend)

        def dense(q, k, v, sinks):
            return dense_attention(q, k, v, start, 0.3, sinks)

        (out, pull), (expected, expected_pull) = jax.vjp(ours, *inputs), jax.vjp(dense, *inputs)
        return (out, pull(cotangent)), (expected, expected_pull(cotangent))

    got, expected = both(q, k, v, sinks)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)
    np.testing.assert_allclose(got[0], loop_attention(q, k, v, start, 0.3, sinks), atol=2e-5)


def test_long_rows_on_a_cpu_equal_a_dense_softmax():
    """Rows whose blocks are computed in pieces, with a last block shorter than a piece."""
    T = 2300
    q, k, v = map(jnp.asarray, arrays(1, T, 2, 1, 8))
    start = jnp.asarray(packed(2, T, 700, 2100)[:1])
    cotangent = jax.random.normal(jax.random.key(0), q.shape)

    @partial(jax.jit, static_argnums=0)
    def outputs(function, *inputs):
        out, pull = jax.vjp(lambda *x: function(*x, start, 0.3), *inputs)
        return out, *pull(cotangent)

    got, expected = (outputs(f, q, k, v) for f in (partial(attention, backend="cpu"), dense_attention))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)


def test_the_memory_of_long_rows_on_a_cpu_grows_with_their_length_and_not_its_square():
    def temporary_bytes(T):
        shapes = (jax.ShapeDtypeStruct((1, T, n, 8), jnp.float32) for n in (2, 1, 1))

        def loss(q, k, v):
            return attention(q, k, v, jnp.zeros((1, T), jnp.int32), 0.3, backend="cpu").sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(8192) < 2.2 * temporary_bytes(4096)


@pytest.mark.parametrize("T", [96, 100])
def test_the_reference_gives_the_same_in_many_small_blocks(T):
    q, k, v = map(jnp.asarray, arrays(2, T, 4, 2, 8))
    start = jnp.asarray(packed(2, T, 17, 40, 64))
    cotangent = jax.random.normal(jax.random.key(0), q.shape)

    @jax.jit
    def run(q, k, v):
        out, lse = reference.forward(q, k, v, start, 0.3, block=16)
        grads = reference.backward(q, k, v, start, 0.3, out, lse, cotangent, block=16)
        expected, pull = jax.vjp(lambda *x: dense_attention(*x, start, 0.3), q, k, v)
        return (out, *grads), (expected, *pull(cotangent))

    for a, b in zip(*run(q, k, v), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_backward_of_rematerialised_layers_does_not_repeat_the_forward(backend):
    """Counted in the compiled program: exponentials of the forward's loop, and of the backward's."""
    q, k, v = map(jnp.asarray, arrays(1, 256, 2, 1, 8))
    start = jnp.zeros((1, 256), jnp.int32)

    def exponentials(policy):
        def layer(q, k):
            return jnp.sin(attention(q, k, v, start, 0.3, backend=backend)), None

        def loss(q, k):
            step = jax.checkpoint(layer, policy=policy, prevent_cse=False)
            return jax.lax.scan(step, q, jnp.stack([k, k]))[0].sum()

        return jax.jit(jax.grad(loss)).lower(q, k).compile().as_text().count("exponential(")

    ours = exponentials(REMAT_POLICIES["attention"])
    assert ours == exponentials(jax.checkpoint_policies.everything_saveable)
    assert ours < exponentials(jax.checkpoint_policies.nothing_saveable)


SPLASH = KERNELS["tpu"]._replace(
    forward=partial(tpu.forward, interpret=True), backward=partial(tpu.backward, interpret=True)
)


@pytest.mark.parametrize(("window", "head_dim"), [(None, 64), (40, 48)])
def test_the_kernel_of_tpus_equals_a_dense_softmax_when_it_is_interpreted(window, head_dim):
    """Also at a length and a head size that have to be padded, and with sinks."""
    q, k, v = map(jnp.asarray, arrays(2, 200, 4, 2, head_dim))
    sinks = jnp.asarray([-1.0, 0.0, 2.0, 5.0])
    start = jnp.asarray(packed(2, 200, 30, 140))
    first = start if window is None else jnp.maximum(start, jnp.arange(200) - window + 1)
    cotangent = jax.random.normal(jax.random.key(0), q.shape)

    @jax.jit
    def both(*inputs):
        def ours(q, k, v, sinks):
            return attention(q, k, v, start, 0.125, window=window, sinks_N=sinks, kernel=SPLASH)

        def dense(q, k, v, sinks):
            return dense_attention(q, k, v, first, 0.125, sinks)

        (out, pull), (expected, expected_pull) = jax.vjp(ours, *inputs), jax.vjp(dense, *inputs)
        return (out, *pull(cotangent)), (expected, *expected_pull(cotangent))

    for a, b in zip(*both(q, k, v, sinks), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "head_dim", "dtype", "reason"),
    [
        ("cpu", 300, jnp.float32, None),
        ("TPU v5p", 192, jnp.bfloat16, None),
        ("TPU v5p", 512, jnp.bfloat16, "at most 256, and these have 512"),
        ("NVIDIA A100-SXM4-80GB", 128, jnp.bfloat16, "Hopper generation"),
        ("NVIDIA H200", 128, jnp.float32, "16-bit floats, and these are float32"),
        pytest.param(
            "NVIDIA H200",
            128,
            jnp.bfloat16,
            "tinsmith[flash]",
            marks=pytest.mark.skipif(find_spec("tokamax") is not None, reason="tokamax is installed"),
        ),
    ],
)
def test_it_says_why_a_kernel_cannot_be_used(kind, head_dim, dtype, reason):
    device = AbstractDevice(device_kind=kind, num_cores=None, platform="")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device)):
        found = why_reference(head_dim, dtype)
    assert found is None if reason is None else reason in found
