"""Paged attention on TPUs: the kernel of jax.experimental.pallas, which reads pages in place."""

from __future__ import annotations

from math import gcd

import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import paged_attention as pallas
from jaxtyping import Array, Float, Int

_POSITIONS_AT_ONCE = 512


def attend(
    q_SNH: Float[Array, "S N H"],
    k_pages: Float[Array, "K X Z H"],
    v_pages: Float[Array, "K X Z H"],
    table_SP: Int[Array, "S P"],
    length_S: Int[Array, " S"],
    scale: float,
) -> Float[Array, "S N H"]:
    """Return softmax(scale * q k^T) v over the first `length_S` positions of each sequence, in q's dtype.

    `length_S` is at least 1."""
    pages_at_once = gcd(table_SP.shape[1], max(1, _POSITIONS_AT_ONCE // k_pages.shape[2]))
    return pallas.paged_attention(
        q_SNH * jnp.asarray(scale, q_SNH.dtype),
        k_pages,
        v_pages,
        length_S,
        table_SP,
        pages_per_compute_block=pages_at_once,
    )


def write(
    pages: Float[Array, "K L P Z H"],
    layer: Int[Array, ""],
    new_WKH: Float[Array, "W K H"],
    page_W: Int[Array, " W"],
    offset_W: Int[Array, " W"],
) -> Float[Array, "K L P Z H"]:
    """Write one layer's vectors of W tokens at (page, offset).

    They are written as rows of a matrix [K L P Z, H], a view: to write several heads of a token as one, the
    compiler would turn all pages into another layout and back."""
    K, L, P, Z, H = pages.shape
    row_W = (layer * P + page_W) * Z + offset_W
    row_WK = row_W[:, None] + jnp.arange(K) * (L * P * Z)
    flat = pages.reshape(-1, H).at[row_WK.reshape(-1)].set(new_WKH.reshape(-1, H))
    return flat.reshape(pages.shape)
