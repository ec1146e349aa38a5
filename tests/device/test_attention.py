"""Attention as this machine's devices compute it, beside the reference in float32.

In `make test` these are CPUs. `make gpu` runs the same on a machine with an accelerator, at lengths that
matter there.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tinsmith.model.kernels.attention import attention
from tinsmith.model.sharding import make_mesh

ON_CPU = jax.default_backend() == "cpu"
LENGTHS = [300] if ON_CPU else [300, 4096, 32768]


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize(("window", "head_dim"), [(None, 128), (100, 64)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_outputs_and_gradients_are_the_reference_s(T, window, head_dim, dtype, record_property):
    """Three segments, grouped heads and sinks. Errors are relative to the largest value of each result."""
    rng = np.random.default_rng(0)
    q, k, v, d_out = (
        jnp.asarray(rng.standard_normal((1, T, heads, head_dim)), dtype) for heads in (4, 2, 2, 4)
    )
    sinks = jnp.asarray([-1.0, 0.0, 2.0, 5.0])
    i = np.arange(T)
    start = jnp.asarray(np.select([i >= T - 70, i >= T // 3], [T - 70, T // 3], 0)[None])

    def run(backend, *inputs):
        def forward(q, k, v, sinks):
            return attention(q, k, v, start, head_dim**-0.5, window=window, sinks_N=sinks, backend=backend)

        out, pull = jax.vjp(forward, *inputs)
        return out, *pull(d_out.astype(out.dtype))

    with jax.set_mesh(make_mesh()), jax.default_matmul_precision("highest" if dtype == jnp.float32 else None):
        got = jax.jit(lambda *x: run(None, *x))(q, k, v, sinks)
    with jax.set_mesh(make_mesh()), jax.default_matmul_precision("highest"):
        wide = [x.astype(jnp.float32) for x in (q, k, v)]
        expected = jax.jit(lambda *x: run("reference", *x))(*wide, sinks)
    bound = 2e-5 if dtype == jnp.float32 else 2e-2
    worst = 0.0
    for a, b in zip(got, expected, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b)
        assert np.isfinite(a).all()
        worst = max(worst, float(np.abs(a - b).max() / np.abs(b).max()))
    record_property("largest error", f"{worst:.1e}")
    assert worst <= bound
