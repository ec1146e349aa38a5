"""Decoding from pages as this machine's devices compute it, beside plain attention in float64.

On a CPU, whose decoding has other pages, it is the reference.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paged_attention_cases import FIRST, LENGTH, SCALE, N, case, expected, pages_of
from tinsmith.model.kernels import paged_attention
from tinsmith.model.kernels.backends import current_backend
from tinsmith.model.sharding import make_mesh


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_decoding_reads_its_layer_s_pages(dtype, windowed, record_property):
    q, k, v, table = case(dtype)
    sinks = np.linspace(-1, 2, N).astype(np.float32)
    first = jnp.asarray(FIRST) if windowed else None
    with jax.set_mesh(make_mesh()), jax.default_matmul_precision("highest" if dtype == jnp.float32 else None):
        backend = current_backend()
        pages = pages_of(k, v, "reference" if backend == "cpu" else backend)
        out = jax.jit(
            lambda q, pages, table: paged_attention.decode_attention(
                q, pages, jnp.int32(1), table, first, jnp.asarray(LENGTH), SCALE, jnp.asarray(sinks)
            )
        )(q, pages, table)
    want = expected(q, k[1], v[1], table, FIRST if windowed else np.zeros_like(FIRST), LENGTH, sinks)
    error = np.abs(np.asarray(out, np.float64) - want).max()
    record_property("largest error", f"{error:.1e}")
    assert error <= (1e-5 if dtype == jnp.float32 else 2e-2)
