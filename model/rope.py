"""Rotary position embedding (arXiv:2104.09864), in the half-split form of Hugging Face.

Letters: B rows, T tokens, N heads, H head dim.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .config import Rope, RopeScaling
from .kernels.rotation import rotated


class Rotation(NamedTuple):
    """Cosine and sine of every token's angles, computed once per forward and used by every layer."""

    cos_BTH: Float[Array, "B T 1 half"]
    sin_BTH: Float[Array, "B T 1 half"]


def inverse_frequencies(rope: Rope) -> Float[np.ndarray, " half"]:
    """Return theta^(-2i/H), scaled as `rope.scaling` says.

    Sources: transformers' `modeling_rope_utils._compute_llama3_parameters` for llama3, arXiv:2309.00071 for
    yarn, arXiv:2402.13753 for longrope.
    """
    half = rope.dims // 2
    frequencies = rope.theta ** (-np.arange(half, dtype=np.float64) / half)
    scaling = rope.scaling
    if scaling is None:
        return frequencies.astype(np.float32)
    if scaling.kind == "linear":
        return (frequencies / scaling.factor).astype(np.float32)
    if scaling.kind == "longrope":
        return (frequencies / np.array(scaling.factors)).astype(np.float32)
    if scaling.kind == "yarn":
        kept = _yarn_kept(rope, scaling)
        return ((1 - kept) * frequencies / scaling.factor + kept * frequencies).astype(np.float32)
    wavelength = 2 * math.pi / frequencies
    cycles = scaling.original_max_position / wavelength
    # 0 for waves too long for the original context, 1 for short ones, linear in between
    kept = (cycles - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0)
    return ((1 - kept) * frequencies / scaling.factor + kept * frequencies).astype(np.float32)


def _yarn_kept(rope: Rope, scaling: RopeScaling) -> Float[np.ndarray, " half"]:
    """Return the unscaled share of each frequency: 1 for fast ones, 0 for slow ones, linear in between."""
    H = rope.dims

    def dimension(turns: float) -> float:
        """Return the index of the pair that turns this many times in the original context."""
        wavelength = scaling.original_max_position / turns
        return H * math.log(wavelength / (2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, H - 1)
    if first == last:
        last += 0.001  # as transformers: a step instead of a ramp
    return 1 - np.clip((np.arange(H // 2) - first) / (last - first), 0.0, 1.0)


def rotation(rope: Rope, position_BT: Int[Array, "B T"]) -> Rotation:
    """Return float32 angles of tokens at `position_BT`, counted from the start of their own sequence."""
    angle = position_BT[:, :, None, None].astype(jnp.float32) * inverse_frequencies(rope)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if rope.scaling is not None and rope.scaling.attention_factor != 1:
        cos, sin = cos * rope.scaling.attention_factor, sin * rope.scaling.attention_factor
    return Rotation(cos, sin)


def rotate(
    x_BTNH: Float[Array, "B T N H"], at: Rotation, interleaved: bool = False
) -> Float[Array, "B T N H"]:
    """Turn each pair (x[i], x[i + H/2]) by its angle, computed in float32 and returned in the dtype of x.

    If `interleaved`, the pairs are (x[2i], x[2i + 1]), and come out as (y[i], y[i + H/2]): queries and keys
    in one order have the same products in another. If there are fewer angles than pairs, H is twice their
    number, and the other dimensions stay as they are."""
    if (turned := 2 * at.cos_BTH.shape[-1]) == 0:
        return x_BTNH
    if turned < x_BTNH.shape[-1]:
        rest = x_BTNH[..., turned:]
        return jnp.concatenate([rotate(x_BTNH[..., :turned], at, interleaved), rest], axis=-1)
    if interleaved:
        x_BTNH = jnp.concatenate([x_BTNH[..., 0::2], x_BTNH[..., 1::2]], axis=-1)
    return rotated(x_BTNH.astype(jnp.float32), at.cos_BTH, at.sin_BTH).astype(x_BTNH.dtype)
