"""Products with one matrix per group of rows on this machine's devices, beside NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tinsmith.model.kernels.grouped_product import grouped_product
from tinsmith.model.sharding import make_mesh

SIZES = np.array([40, 0, 1, 87, 128], np.int32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_and_gradients(dtype, record_property):
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.normal(size=(SIZES.sum(), width)), dtype) for width in (64, 96))
    w = jnp.asarray(rng.normal(size=(len(SIZES), 64, 96)), dtype)

    @jax.jit
    def run(x, w, dy):
        y, pull = jax.vjp(lambda x, w: grouped_product(x, w, jnp.asarray(SIZES)), x, w)
        return y, *pull(dy)

    with jax.set_mesh(make_mesh()), jax.default_matmul_precision("highest" if dtype == jnp.float32 else None):
        got = run(x, w, dy)
    x64, w64, dy64 = (np.asarray(each, np.float64) for each in (x, w, dy))
    group = np.repeat(np.arange(len(SIZES)), SIZES)
    dw = np.stack([x64[group == g].T @ dy64[group == g] for g in range(len(SIZES))])
    want = (
        np.einsum("si,sio->so", x64, w64[group]),
        np.einsum("so,sio->si", dy64, w64[group]),
        dw,
    )
    worst = max(
        float(np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max())
        for a, b in zip(got, want, strict=True)
    )
    record_property("largest error", f"{worst:.1e}")
    assert worst <= (1e-5 if dtype == jnp.float32 else 1e-2)
