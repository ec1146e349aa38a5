"""Attention to keys and values in pages, on every backend, against plain attention in float64."""

import contextlib
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from paged_attention_cases import FIRST, LENGTH, SCALE, H, K, N, S, case, expected, pages_of
from tinsmith.model.kernels import paged_attention
from tinsmith.model.kernels.paged_attention import gpu, reference, tpu


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(gpu, "attend", partial(gpu.attend, interpret=True))


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("backend", ["reference", "gpu", "tpu"])
@pytest.mark.parametrize("windowed", [False, True])
def test_decoding_reads_the_pages_of_its_layer(backend, windowed, dtype, bound):
    q, k, v, table = case(dtype)
    first = jnp.asarray(FIRST) if windowed else None
    with pltpu.force_tpu_interpret_mode() if backend == "tpu" else contextlib.nullcontext():
        out = paged_attention.decode_attention(
            q, pages_of(k, v, backend), jnp.int32(1), table, first, jnp.asarray(LENGTH), SCALE
        )
    want = expected(q, k[1], v[1], table, FIRST if windowed else np.zeros_like(FIRST), LENGTH)
    assert out.dtype == dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), want, atol=bound)


@pytest.mark.parametrize("backend", ["reference", "gpu", "tpu"])
def test_sinks_take_part_in_the_softmax(backend):
    q, k, v, table = case(jnp.float32)
    sinks = np.random.default_rng(2).normal(size=N).astype(np.float32)
    first, length = jnp.asarray(FIRST), jnp.asarray(LENGTH)
    pages = pages_of(k, v, backend)
    out = paged_attention.decode_attention(
        q, pages, jnp.int32(1), table, first, length, SCALE, jnp.asarray(sinks)
    )
    want = expected(q, k[1], v[1], table, FIRST, LENGTH, sinks)
    np.testing.assert_allclose(out, want, atol=1e-5)


def test_the_tpu_has_its_kernel_where_it_takes_the_shape(monkeypatch):
    called = []
    monkeypatch.setattr(tpu, "attend", lambda *arguments, scale: called.append(scale) or arguments[0])
    q, k, v, table = case(jnp.bfloat16)
    decode = partial(paged_attention.decode_attention, q, pages_of(k, v, "tpu"), jnp.int32(0), table)
    decode(None, jnp.asarray(LENGTH), SCALE)
    decode(jnp.asarray(FIRST), jnp.asarray(LENGTH), SCALE)  # a window: XLA
    assert called == [SCALE]


@pytest.mark.parametrize("backend", ["reference", "tpu"])
def test_contexts_of_prompts_merge_with_the_tokens_own_keys(backend):
    """Attention to a context and to other keys, merged, is attention to both."""
    q, k, v, table = case(jnp.float32)
    pages = pages_of(k, v, backend)
    read = partial(paged_attention.context_attention, q[:, None], pages, jnp.int32(1), table)
    middle = (FIRST + LENGTH) // 2
    parts = (
        read(jnp.asarray(FIRST)[:, None], jnp.asarray(middle), SCALE),
        read(jnp.asarray(middle)[:, None], jnp.asarray(LENGTH), SCALE),
    )
    merged = paged_attention.merge(*parts)[:, 0]
    np.testing.assert_allclose(merged, expected(q, k[1], v[1], table, FIRST, LENGTH), atol=1e-5)


def test_a_query_that_sees_nothing_gets_zeros():
    q, k, v, table = case(jnp.float32)
    nothing = jnp.zeros(S, jnp.int32)
    for out in (
        reference.attend(q[:, None], k[0], v[0], table, nothing[:, None], nothing, SCALE)[0],
        gpu.attend(q, k[0], v[0], table, nothing, nothing, SCALE)[0],
    ):
        np.testing.assert_array_equal(out, 0)


@pytest.mark.parametrize("backend", ["reference", "gpu", "tpu"])
def test_a_layer_is_written_at_its_places(backend):
    _, k, v, _ = case(jnp.float32)
    rng = np.random.default_rng(1)
    new_k, new_v = (jnp.asarray(rng.normal(size=(3, K, H)), jnp.float32) for _ in "kv")
    page, offset = np.array([4, 7, 4], np.int32), np.array([0, 15, 3], np.int32)
    written = paged_attention.write_layer(
        pages_of(k, v, backend), jnp.int32(1), [new_k, new_v], jnp.asarray(page), jnp.asarray(offset)
    )
    want_k, want_v = np.array(k), np.array(v)
    want_k[1, page, :, offset], want_v[1, page, :, offset] = new_k, new_v
    want = pages_of(jnp.asarray(want_k), jnp.asarray(want_v), backend)
    np.testing.assert_array_equal(written[0], want.k)
    np.testing.assert_array_equal(written[1], want.v)
