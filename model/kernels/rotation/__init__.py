"""Rotation of the pairs (x[i], x[i + H/2]) of each head by their angles (`model.rope`)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..backends import current_backend
from . import cpu


def rotated(
    x_BTNH: Float[Array, "B T N H"], cos_BTH: Float[Array, "B T 1 half"], sin_BTH: Float[Array, "B T 1 half"]
) -> Float[Array, "B T N H"]:
    """Return (a cos - b sin, b cos + a sin) for the halves a and b of each head."""
    if current_backend() == "cpu" and x_BTNH.shape[1] == 1:
        return cpu.rotated_one(x_BTNH, cos_BTH, sin_BTH)
    a, b = jnp.split(x_BTNH, 2, axis=-1)
    return jnp.concatenate([a * cos_BTH - b * sin_BTH, b * cos_BTH + a * sin_BTH], axis=-1)
