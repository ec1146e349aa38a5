"""Two-byte floats stored as integers with the same bits, for CPUs.

To read or write a few bfloat16 values of an array, XLA's CPU backend would convert all of it to float32 and
back."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def stored_dtype(dtype: Any) -> Any:
    """Return the dtype in which values of `dtype` are stored."""
    return jnp.uint16 if jnp.dtype(dtype).itemsize == 2 else dtype


def stored(x: Array) -> Array:
    """Return x as it is stored, inside a program."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def restored(x: Array, dtype: Any) -> Array:
    """Return stored values as values of `dtype`, inside a program."""
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


def stored_view(x: Array) -> Array:
    """Return an array on a CPU device as it is stored, without a copy."""
    if x.dtype.itemsize != 2:
        return x
    return jax.device_put(np.asarray(x).view(np.uint16), x.device, may_alias=True)
