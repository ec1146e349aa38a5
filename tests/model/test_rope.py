"""The rotation of queries and keys: pairs of coordinates as complex numbers, turned by their angles."""

import jax.numpy as jnp
import numpy as np
import pytest
from tinsmith.model import rope


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("tokens", [1, 6])
def test_rotation_is_a_complex_product(tiny, tokens, dtype):
    (of,) = tiny("qwen3").config.ropes
    rng = np.random.default_rng(tokens)
    position = rng.integers(0, 1000, (4, tokens))
    x = jnp.asarray(rng.normal(size=(4, tokens, 3, of.dims)), dtype)
    turned = rope.rotate(x, rope.rotation(of, jnp.asarray(position)))
    assert turned.dtype == dtype

    real, imaginary = np.split(np.asarray(x, np.float64), 2, axis=-1)
    frequencies = of.theta ** (-2 * np.arange(of.dims // 2) / of.dims)
    expected = (real + 1j * imaginary) * np.exp(1j * position[:, :, None, None] * frequencies)
    expected = np.concatenate([expected.real, expected.imag], axis=-1)
    tolerance = 2e-4 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(np.asarray(turned, np.float64), expected, atol=tolerance, rtol=tolerance)
