"""Products of a few rows, as the CPU backend computes them fastest."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def by_output(x_BTI: Float[Array, "B T I"], w_OI: Float[Array, "O I"]) -> Float[Array, "B T O"]:
    """Return x W^T for a few rows, computed in W's dtype and summed in float32."""
    B, T, into = x_BTI.shape
    rows = x_BTI.reshape(B * T, into).astype(w_OI.dtype)
    if B * T == 1 and w_OI.dtype != jnp.float32:
        rows = jnp.repeat(rows, 2, axis=0)  # for a single row, the CPU backend would convert all of W
    y_RO = jnp.einsum("ri,oi->ro", rows, w_OI, preferred_element_type=jnp.float32)
    return y_RO[: B * T].reshape(B, T, -1)
