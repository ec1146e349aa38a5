"""A product of sorted rows with one matrix per group of rows, with its gradients.

Rows of a group lie side by side, groups in order: rows [sum of sizes before g, + sizes[g]) belong to group g.
Rows after the last group get undefined results and no gradient.

A backend's module has three functions. `product(x, w, sizes)` multiplies every row with its group's matrix,
and `product_transposed(dy, w, sizes)` with its transpose; `outer(x, dy, sizes)` returns each group's x^T dy,
summed in float32. The cost is in proportion to the rows, not to rows times groups.

Letters: S rows, G groups, I inputs, O outputs, M matrices of these and of other groups.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..backends import Backend, current_backend
from . import cpu, gpu, ragged, reference
from .stacked import Stacked


class Kernel(NamedTuple):
    """A backend's implementation.

    product(x [S I], w, sizes [G]) -> [S O], all in x's dtype
    product_transposed(dy [S O], w, sizes [G]) -> [S I], all in dy's dtype
    outer(x [S I], dy [S O], sizes [G]) -> [G I O] float32

    If it `picks`, w is `Stacked`, otherwise [G I O].
    """

    product: Callable[[Array, Any, Array], Array]
    product_transposed: Callable[[Array, Any, Array], Array]
    outer: Callable[[Array, Array, Array], Array]
    picks: bool = False


_KERNELS: dict[Backend, Kernel] = {
    "reference": Kernel(reference.product, reference.product_transposed, reference.outer),
    "cpu": Kernel(cpu.product, cpu.product_transposed, cpu.outer, picks=True),
    "gpu": Kernel(gpu.product, gpu.product_transposed, gpu.outer),
    "tpu": Kernel(ragged.product, ragged.product_transposed, ragged.outer),
}


def grouped_product(
    x_SI: Float[Array, "S I"],
    w_GIO: Float[Array, "G I O"] | Stacked,
    sizes_G: Int[Array, " G"],
    backend: Backend | None = None,
) -> Float[Array, "S O"]:
    """Return x[s] @ w[the group of s] in x's dtype. `backend` is by default that of the current mesh.

    Differentiable in x and w. w's gradient is summed in float32 and has w's dtype."""
    of = w_GIO if isinstance(w_GIO, Stacked) else Stacked(w_GIO, jnp.int32(0))
    return _product(_KERNELS[backend or current_backend()], x_SI, of, sizes_G)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(kernel: Kernel, x_SI: Array, w: Stacked, sizes_G: Array) -> Array:
    return kernel.product(x_SI, _matrices(kernel, w, sizes_G, x_SI.dtype), sizes_G)


def _forward(kernel: Kernel, x_SI: Array, w: Stacked, sizes_G: Array) -> tuple[Array, tuple]:
    return _product(kernel, x_SI, w, sizes_G), (x_SI, w, sizes_G)


def _backward(kernel: Kernel, kept: tuple, dy_SO: Array) -> tuple[Array, Stacked, None]:
    x_SI, w, sizes_G = kept
    dx_SI = kernel.product_transposed(dy_SO, _matrices(kernel, w, sizes_G, dy_SO.dtype), sizes_G)
    dw = kernel.outer(x_SI, dy_SO, sizes_G).astype(w.matrices.dtype)
    if len(dw) < len(w.matrices):
        dw = jax.lax.dynamic_update_slice_in_dim(jnp.zeros_like(w.matrices), dw, w.first, 0)
    return dx_SI, Stacked(dw, None), None


def _matrices(kernel: Kernel, w: Stacked, sizes_G: Array, dtype: Any) -> Stacked | Array:
    """Return the groups' matrices as the kernel takes them."""
    w = w._replace(matrices=w.matrices.astype(dtype))
    if kernel.picks:
        return w
    if len(w.matrices) == len(sizes_G):
        return w.matrices
    return jax.lax.dynamic_slice_in_dim(w.matrices, w.first, len(sizes_G))


_product.defvjp(_forward, _backward)
