"""Rotation on CPUs."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def rotated_one(
    x_B1NH: Float[Array, "B 1 N H"], cos_B1H: Float[Array, "B 1 1 half"], sin_B1H: Float[Array, "B 1 1 half"]
) -> Float[Array, "B 1 N H"]:
    """Return `rotated` for one token per row.

    The CPU backend concatenates element by element, but reverses the halves with vector instructions. For
    many tokens this form is slower."""
    halves = x_B1NH.reshape(*x_B1NH.shape[:-1], 2, -1)
    signs = jnp.array([[-1.0], [1.0]])
    turned = halves * cos_B1H[..., None, :] + halves[..., ::-1, :] * (signs * sin_B1H[..., None, :])
    return turned.reshape(x_B1NH.shape)
