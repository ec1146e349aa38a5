"""A product of sorted rows with one matrix per group of rows, with its gradients.

Rows of a group lie side by side, groups in order: rows [sum of sizes before g, + sizes[g]) belong to group g.
Rows after the last group get undefined results and no gradient.

A backend's module has three functions. `product(x, w, sizes)` multiplies every row with its group's matrix,
and `product_transposed(dy, w, sizes)` with its transpose; `outer(x, dy, sizes)` returns each group's x^T dy,
summed in float32. The cost is in proportion to the rows, not to rows times groups.

Letters: S rows, G groups, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Int

from ..backends import Backend, current_backend
from . import cpu, ragged, reference


class Kernel(NamedTuple):
    """A backend's implementation.

    product(x [S I], w [G I O], sizes [G]) -> [S O], all in x's dtype
    product_transposed(dy [S O], w [G I O], sizes [G]) -> [S I], all in dy's dtype
    outer(x [S I], dy [S O], sizes [G]) -> [G I O] float32
    """

    product: Callable[[Array, Array, Array], Array]
    product_transposed: Callable[[Array, Array, Array], Array]
    outer: Callable[[Array, Array, Array], Array]


_RAGGED = Kernel(ragged.product, ragged.product_transposed, ragged.outer)
_KERNELS: dict[Backend, Kernel] = {
    "reference": Kernel(reference.product, reference.product_transposed, reference.outer),
    "cpu": Kernel(cpu.product, cpu.product_transposed, cpu.outer),
    "gpu": _RAGGED,
    "tpu": _RAGGED,
}


def grouped_product(
    x_SI: Float[Array, "S I"],
    w_GIO: Float[Array, "G I O"],
    sizes_G: Int[Array, " G"],
    backend: Backend | None = None,
) -> Float[Array, "S O"]:
    """Return x[s] @ w[the group of s] in x's dtype. `backend` is by default that of the current mesh.

    Differentiable in x and w. w's gradient is summed in float32 and has w's dtype."""
    return _product(_KERNELS[backend or current_backend()], x_SI, w_GIO, sizes_G)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(kernel: Kernel, x_SI: Array, w_GIO: Array, sizes_G: Array) -> Array:
    return kernel.product(x_SI, w_GIO.astype(x_SI.dtype), sizes_G)


def _forward(kernel: Kernel, x_SI: Array, w_GIO: Array, sizes_G: Array) -> tuple[Array, tuple]:
    return _product(kernel, x_SI, w_GIO, sizes_G), (x_SI, w_GIO, sizes_G)


def _backward(kernel: Kernel, kept: tuple, dy_SO: Array) -> tuple[Array, Array, None]:
    x_SI, w_GIO, sizes_G = kept
    dx_SI = kernel.product_transposed(dy_SO, w_GIO.astype(dy_SO.dtype), sizes_G)
    return dx_SI, kernel.outer(x_SI, dy_SO, sizes_G).astype(w_GIO.dtype), None


_product.defvjp(_forward, _backward)
