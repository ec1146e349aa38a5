"""Products of sorted rows with one matrix per group equal a loop over the groups, on every backend."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tinsmith.model.kernels.grouped_product import grouped_product

SIZES = {
    "empty groups": [0, 5, 0, 0, 300, 1, 0],
    "one group": [0, 64, 0],
    "rows beyond the last group": [3, 0, 9],
    "blocks of exact size": [128, 256, 128],
    "a few rows of many groups": [1, 0, 2, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
}


@pytest.mark.parametrize("backend", ["cpu", "gpu", "reference"])
@pytest.mark.parametrize("case", SIZES)
def test_rows_meet_the_matrix_of_their_group(case, backend):
    rng = np.random.default_rng(0)
    sizes, spare = SIZES[case], 7 if case == "rows beyond the last group" else 0
    ends = np.cumsum(sizes)
    x, w = rng.standard_normal((ends[-1] + spare, 12)), rng.standard_normal((len(sizes), 12, 20))
    dy = rng.standard_normal((len(x), 20))
    dy[ends[-1] :] = 0

    def run(x, w):
        return grouped_product(x, w, jnp.asarray(sizes), backend)

    y, pull = jax.vjp(jax.jit(run), *(jnp.asarray(each, jnp.float32) for each in (x, w)))
    dx, dw = pull(jnp.asarray(dy, jnp.float32))
    for group, (begin, end) in enumerate(zip(ends - sizes, ends, strict=True)):
        rows = slice(begin, end)
        np.testing.assert_allclose(y[rows], x[rows] @ w[group], atol=1e-4)
        np.testing.assert_allclose(dx[rows], dy[rows] @ w[group].T, atol=1e-4)
        np.testing.assert_allclose(dw[group], x[rows].T @ dy[rows], atol=1e-3)


def test_a_float32_matrix_beside_bfloat16_rows_has_a_float32_gradient():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((600, 4)), jnp.bfloat16)
    w = jnp.asarray(rng.standard_normal((2, 4, 3)), jnp.float32)
    sizes = jnp.asarray([599, 1])
    y, pull = jax.vjp(lambda w: grouped_product(x, w, sizes, "cpu"), w)
    assert y.dtype == jnp.bfloat16
    (dw,) = pull(jnp.ones_like(y))
    assert dw.dtype == jnp.float32
    expected = np.asarray(x, np.float64)[:599].sum(0)
    np.testing.assert_allclose(dw[0], expected[:, None].repeat(3, 1), rtol=1e-5, atol=1e-3)
