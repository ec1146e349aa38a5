"""Products with float32 sums, forward and both gradients, against float64; and what a processor gets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tinsmith.engine import base_models, processor
from tinsmith.model import decoder
from tinsmith.model.folder import read_config
from tinsmith.model.kernels.product import Form, product
from tinsmith.model.sharding import make_mesh
from tiny_models import write_model


def arrays(rows, into, out, dtype):
    rng = np.random.default_rng(0)
    shapes = (2, 24, into), (2, into, out) if rows else (into, out), (2, 24, out)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


@pytest.mark.parametrize("form", [Form.PLAIN, Form.WIDE_SUMS])
@pytest.mark.parametrize(("into", "out"), [(40, 12), (12, 40)])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
def test_product_and_its_gradients(form, into, out, rows, dtype, bound):
    x, w, dy = arrays(rows, into, out, dtype)
    y, pull = jax.vjp(lambda x, w: product(x, w, form), x, w)
    dx, dw = pull(dy)
    x64, w64, dy64 = (np.asarray(a, np.float64) for a in (x, w, dy))
    dw64 = x64.swapaxes(1, 2) @ dy64
    expected = x64 @ w64, dy64 @ w64.swapaxes(-1, -2), dw64 if rows else dw64.sum(0)
    for found, want in zip((y, dx, dw), expected, strict=True):
        assert found.dtype == dtype
        np.testing.assert_allclose(np.asarray(found, np.float64), want, atol=bound * np.abs(want).max())


def test_wide_sums_leave_no_narrow_product_in_the_trunk(tmp_path):
    """Forward and backward, with adapters: each product of bfloat16 has a float32 result."""
    config = read_config(write_model(tmp_path, "llama"))
    graph, base = decoder.build(config, jnp.bfloat16, Form.WIDE_SUMS)
    tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)

    def loss(base, tokens):
        return decoder.trunk(graph, base, tokens, tokens, tokens).astype(jnp.float32).sum()

    text = jax.jit(jax.grad(loss)).lower(base, tokens).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line and "bf16" in line]
    assert len(products) > 7 * 3
    assert not [line for line in products if line.rsplit("->", 1)[1].strip().endswith("xbf16>")]


def test_only_processors_with_amx_get_wide_sums(monkeypatch):
    mesh = make_mesh()
    for has_amx, dtype, form in (
        (True, jnp.bfloat16, Form.WIDE_SUMS),
        (True, jnp.float32, Form.PLAIN),
        (False, jnp.bfloat16, Form.PLAIN),
    ):
        monkeypatch.setattr(processor, "has_amx", lambda has_amx=has_amx: has_amx)
        assert base_models.product_form(jnp.dtype(dtype), mesh) is form
