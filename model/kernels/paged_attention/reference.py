"""Paged attention in plain XLA: one loop over a table's columns, a page of every sequence at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

MASKED = -1e30
"""The score of a masked key; finite, so that a query without a visible key gives finite values."""


def attend(
    q_STNH: Float[Array, "S T N H"],
    k_pages: Float[Array, "X K Z H"] | Float[Array, "K X Z H"],
    v_pages: Float[Array, "X K Z H"] | Float[Array, "K X Z H"],
    table_SP: Int[Array, "S P"],
    first_ST: Int[Array, "S T"],
    length_S: Int[Array, " S"],
    scale: float,
    pages_axis: int = 0,
) -> tuple[Float[Array, "S T N H"], Float[Array, "S T N"]]:
    """Return softmax(scale * q k^T) v in float32, and the log-sum-exp of each query's scores.

    Query t of a sequence sees its positions from `first_ST` up to, not including, `length_S`. The softmax is
    accumulated over pages (arXiv:1805.02867). A query that sees nothing gets zeros and a log-sum-exp of about
    -1e30. `pages_axis` is the place of X in the pages' shape.
    """
    S, T, N, H = q_STNH.shape
    K, Z = k_pages.shape[1 - pages_axis], k_pages.shape[2]
    q_SKGTH = (q_STNH * jnp.asarray(scale, q_STNH.dtype)).reshape(S, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    first_S1T1 = first_ST[:, None, :, None]

    def add_page(column: Array, state: tuple) -> tuple:
        out, highest, total = state
        page_S = jax.lax.dynamic_slice_in_dim(table_SP, column, 1, axis=1)[:, 0]
        k_SKZH, v_SKZH = (
            jnp.moveaxis(jnp.take(x, page_S, axis=pages_axis), pages_axis, 0) for x in (k_pages, v_pages)
        )
        scores = jnp.einsum("skgth,skzh->skgtz", q_SKGTH, k_SKZH, preferred_element_type=jnp.float32)
        position = column * Z + jnp.arange(Z)
        visible_S1TZ = (position >= first_S1T1) & (position < length_S[:, None, None, None])
        visible = visible_S1TZ[:, :, None]
        new_highest = jnp.maximum(highest, jnp.where(visible, scores, MASKED).max(-1))
        weights = jnp.where(visible, jnp.exp(scores - new_highest[..., None]), 0.0)
        kept = jnp.exp(highest - new_highest)
        mixed = jnp.einsum(
            "skgtz,skzh->skgth", weights.astype(v_SKZH.dtype), v_SKZH, preferred_element_type=jnp.float32
        )
        return out * kept[..., None] + mixed, new_highest, total * kept + weights.sum(-1)

    shape = q_SKGTH.shape
    state = (jnp.zeros(shape), jnp.full(shape[:-1], MASKED), jnp.zeros(shape[:-1]))
    begin = jnp.min(first_ST) // Z
    end = jnp.minimum((jnp.max(length_S) + Z - 1) // Z, table_SP.shape[1])
    out, highest, total = jax.lax.fori_loop(begin, end, add_page, state)
    seen = total > 0
    out = out / jnp.where(seen, total, 1.0)[..., None]
    lse = jnp.where(seen, highest + jnp.log(jnp.where(seen, total, 1.0)), MASKED)
    return out.transpose(0, 3, 1, 2, 4).reshape(S, T, N, H), lse.transpose(0, 3, 1, 2).reshape(S, T, N)
