"""`jax.lax.ragged_dot`, which XLA compiles to grouped kernels on TPUs.

On CPUs and GPUs it multiplies every row with every group's matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.lax import RaggedDotDimensionNumbers
from jaxtyping import Array, Float, Int

_OUTER = RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def product(
    x_SI: Float[Array, "S I"], w_GIO: Float[Array, "G I O"], sizes_G: Int[Array, " G"]
) -> Float[Array, "S O"]:
    return jax.lax.ragged_dot(x_SI, w_GIO, sizes_G)


def product_transposed(
    dy_SO: Float[Array, "S O"], w_GIO: Float[Array, "G I O"], sizes_G: Int[Array, " G"]
) -> Float[Array, "S I"]:
    return product(dy_SO, w_GIO.swapaxes(1, 2), sizes_G)


def outer(
    x_SI: Float[Array, "S I"], dy_SO: Float[Array, "S O"], sizes_G: Int[Array, " G"]
) -> Float[Array, "G I O"]:
    return jax.lax.ragged_dot_general(x_SI, dy_SO, sizes_G, _OUTER, preferred_element_type=jnp.float32)
