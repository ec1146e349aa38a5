"""Products as the CPU backend computes them fastest."""

from __future__ import annotations

import jax
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


def weight_gradient(
    x_BTI: Float[Array, "B T I"], dy_BTO: Float[Array, "B T O"], rows: str
) -> Float[Array, "*B I O"]:
    """Return x^T dy summed over tokens in float32: for each row if `rows` is "b", and over them if it is "".

    The CPU backend transposes the left operand of a sum over tokens in memory, so the narrow one goes left.
    Autodiff would transpose the wide one, and recompute its producer in that order."""
    if x_BTI.shape[-1] <= dy_BTO.shape[-1]:
        return jnp.einsum(f"bti,bto->{rows}io", x_BTI, dy_BTO, preferred_element_type=jnp.float32)
    dw = jnp.einsum(f"bto,bti->{rows}oi", dy_BTO, x_BTI, preferred_element_type=jnp.float32)
    # Kept separate from the product: the CPU has no bfloat16 kernel for the product that includes it.
    return jax.lax.optimization_barrier(dw).swapaxes(-1, -2)
