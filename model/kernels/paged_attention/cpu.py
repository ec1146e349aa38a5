"""Paged attention on CPUs: a sequence's pages are laid end to end once per call, then read by plain products.

Letters: S rows, T tokens, N query heads, K kv heads, H head dim, V head dim of values, L layers, P pages of a
table, Z positions of a page, C keys of one array, W tokens written at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..attention.cpu import MASKED
from ..two_byte_floats import restored, stored
from .pages import Pages


def read_layer(
    pages: Pages, layer: int | Int[Array, ""], table_SP: Int[Array, "S P"], dtype: Any
) -> tuple[Float[Array, "S K H C"], Float[Array, "S K C V"]]:
    """Read one layer's keys and values from the pages in each row of `table_SP`, end to end.

    They have the dtype in which they were written."""
    S, P = table_SP.shape
    K, H, Z = pages.k.shape[2:]
    k_SPKHZ = restored(pages.k[layer, table_SP], dtype)
    v_SPKZH = k_SPKHZ.swapaxes(3, 4) if pages.v is None else restored(pages.v[layer, table_SP], dtype)
    return (
        k_SPKHZ.transpose(0, 2, 3, 1, 4).reshape(S, K, H, P * Z),
        v_SPKZH.transpose(0, 2, 1, 3, 4).reshape(S, K, P * Z, v_SPKZH.shape[-1]),
    )


def write(
    pages: Pages,
    new: Sequence[Float[Array, "W L K _"]],
    page_W: Int[Array, " W"],
    offset_W: Int[Array, " W"],
) -> list[Array]:
    """Return the arrays that `pages` stores with the keys, and values if they are stored, of W tokens, in all
    layers, at (page, offset)."""
    k, *v = map(stored, new)
    written = [pages.k.at[:, page_W, :, :, offset_W].set(k)]
    return written + [pages.v.at[:, page_W, :, offset_W].set(of_tokens) for of_tokens in v]


def attend_parts(
    q_STNH: Float[Array, "S T N H"],
    parts: list[tuple[Array, Array, Array]],
    scale: float,
    sinks_N: Float[Array, " N"] | None = None,
) -> Float[Array, "S T N H"]:
    """Return softmax(scale * q k^T) v over C keys held in several arrays of S rows. The softmax is float32.

    `sinks_N` are logits that take part in the softmax of each head and have no value.

    A part is (k [S K H C], v [S K C H], visible [S T C]). Parts may have different dtypes; products with
    two-byte floats are summed in float32.
    """
    S, T, N, H = q_STNH.shape
    K = parts[0][0].shape[1]
    q = (q_STNH * jnp.asarray(scale, q_STNH.dtype)).reshape(S, T, K, N // K, H)
    q = q.transpose(0, 2, 3, 1, 4).reshape(S, K, N // K * T, H)

    def scores(keys: Array, visible: Array) -> Array:
        found = jnp.einsum("skqh,skhc->skqc", q.astype(keys.dtype), keys, preferred_element_type=jnp.float32)
        found = found.reshape(S, K, N // K, T, keys.shape[3])
        return jnp.where(visible[:, None, None], found, MASKED)

    found = [scores(k, visible) for k, _, visible in parts]
    highest = jnp.stack([z.max(-1) for z in found]).max(0)[..., None]
    if sinks_N is not None:
        sinks = sinks_N.astype(jnp.float32).reshape(K, N // K, 1, 1)
        highest = jnp.maximum(highest, sinks)
    weights = [jnp.exp(z - highest) for z in found]
    total = sum(w.sum(-1, keepdims=True) for w in weights)
    if sinks_N is not None:
        total = total + jnp.exp(sinks - highest)
    mixed = sum(
        jnp.einsum(
            "skqc,skch->skqh",
            (w / total).astype(v.dtype).reshape(S, K, N // K * T, -1),
            v,
            preferred_element_type=jnp.float32,
        )
        for w, (_, v, _) in zip(weights, parts, strict=True)
    )
    mixed = mixed.reshape(S, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(S, T, N, H)
    return mixed.astype(q_STNH.dtype)
