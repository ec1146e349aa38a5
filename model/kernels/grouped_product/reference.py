"""Every row with every group's matrix, and the right one picked: for tests and unknown devices."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def product(
    x_SI: Float[Array, "S I"], w_GIO: Float[Array, "G I O"], sizes_G: Int[Array, " G"]
) -> Float[Array, "S O"]:
    return jnp.einsum("gs,si,gio->so", _member(len(x_SI), sizes_G).astype(x_SI.dtype), x_SI, w_GIO)


def product_transposed(
    dy_SO: Float[Array, "S O"], w_GIO: Float[Array, "G I O"], sizes_G: Int[Array, " G"]
) -> Float[Array, "S I"]:
    return product(dy_SO, w_GIO.swapaxes(1, 2), sizes_G)


def outer(
    x_SI: Float[Array, "S I"], dy_SO: Float[Array, "S O"], sizes_G: Int[Array, " G"]
) -> Float[Array, "G I O"]:
    x, dy = x_SI.astype(jnp.float32), dy_SO.astype(jnp.float32)
    return jnp.einsum("gs,si,so->gio", _member(len(x), sizes_G).astype(jnp.float32), x, dy)


def _member(rows: int, sizes_G: Int[Array, " G"]) -> Bool[Array, "G S"]:
    end_G1 = jnp.cumsum(sizes_G)[:, None]
    row = jnp.arange(rows)
    return (row >= end_G1 - sizes_G[:, None]) & (row < end_G1)
