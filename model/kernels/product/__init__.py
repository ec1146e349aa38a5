"""Products of tokens with matrices, in the form that suits the processor."""

from __future__ import annotations

from enum import Enum
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..backends import current_backend
from . import cpu
from .cpu import by_output

__all__ = ["Form", "by_output", "linear", "matrix", "product"]


class Form(Enum):
    """A way to multiply with a decoder's matrices (`decoder.build`)."""

    PLAIN = "plain"
    """x W in x's dtype. XLA chooses how to sum."""
    WIDE_SUMS = "wide sums"
    """x W with float32 sums, rounded at the end; so are its gradients. For bfloat16 on CPUs with AMX, where
    XLA's kernels for such products are several times as fast as those for plain ones."""
    BY_OUTPUT = "by output"
    """x W^T with W stored as [out, in] and float32 sums, for a few rows on a CPU (`cpu.by_output`)."""


def linear(x_BTI: Float[Array, "B T I"], w: Float[Array, "*matrix"], form: Form) -> Float[Array, "B T O"]:
    """Return x W for a matrix stored as `form` requires: in x's dtype, or float32 with BY_OUTPUT."""
    if form is Form.PLAIN:
        return x_BTI @ w
    return by_output(x_BTI, w) if form is Form.BY_OUTPUT else product(x_BTI, w, form)


def matrix(w: Float[Array, "*matrix"], form: Form) -> Float[Array, "I O"]:
    """Return W as [in, out], from a matrix stored as `form` requires."""
    return w.T if form is Form.BY_OUTPUT else w


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(
    x_BTI: Float[Array, "B T I"], w: Float[Array, "*B I O"], form: Form = Form.PLAIN
) -> Float[Array, "B T O"]:
    """Return x w in x's dtype, where `w` is one matrix or one per row, in any dtype.

    w's gradient is summed in float32."""
    return _times(x_BTI, w, form)


def _times(x_BTI: Array, w: Array, form: Form) -> Array:
    w = w.astype(x_BTI.dtype)
    if form is Form.PLAIN:
        return x_BTI @ w
    return jnp.matmul(x_BTI, w, preferred_element_type=jnp.float32).astype(x_BTI.dtype)


def _forward(x_BTI: Array, w: Array, form: Form) -> tuple[Array, tuple[Array, Array]]:
    return _times(x_BTI, w, form), (x_BTI, w)


def _backward(form: Form, saved: tuple[Array, Array], dy_BTO: Array) -> tuple[Array, Array]:
    x_BTI, w = saved
    dx_BTI = _times(dy_BTO, w.swapaxes(-1, -2), form)
    rows = "b" if w.ndim == 3 else ""
    if current_backend() == "cpu":
        dw = cpu.weight_gradient(x_BTI, dy_BTO, rows)
    else:
        dw = jnp.einsum(f"bti,bto->{rows}io", x_BTI, dy_BTO, preferred_element_type=jnp.float32)
    return dx_BTI, dw.astype(w.dtype)


product.defvjp(_forward, _backward)
