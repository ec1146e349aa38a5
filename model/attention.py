"""Causal attention over packed rows.

One mask serves packing, padding and sliding windows: `start[b, t]`, the first key that query t of row b
sees. Key j is visible to query i iff start[b, i] <= j <= i.

Letters: B rows, T tokens, N query heads, K kv heads, G = N / K query heads per kv head, H head dim,
Q queries of one block, S keys that a block sees.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

MASKED = -1e30
"""Finite, so that a row without any visible key gives a mean of values rather than NaN."""

_QUERY_BLOCKS = 4
_SMALLEST_BLOCK = 64


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    start_BT: Int[Array, "B T"],
    scale: float,
) -> Float[Array, "B T N H"]:
    """softmax(scale * q k^T + mask) v, grouped heads, softmax in float32.

    There may be more keys than queries: the queries are then the last T of the S positions (a prompt
    continued after cached keys), and `start_BT` counts from the first key.

    The queries are cut into a few blocks and each block sees only the keys up to its own end, which saves
    nearly half of the dense product's work above the diagonal.
    """
    T = q_BTNH.shape[1]
    first = k_BSKH.shape[1] - T
    size = max(_SMALLEST_BLOCK, -(-T // _QUERY_BLOCKS))
    blocks = []
    for begin in range(0, T, size):
        end = min(begin + size, T)
        blocks.append(
            _attend_block(
                q_BTNH[:, begin:end],
                k_BSKH[:, : first + end],
                v_BSKH[:, : first + end],
                start_BT[:, begin:end],
                first + begin,
                scale,
            )
        )
    return jnp.concatenate(blocks, axis=1) if len(blocks) > 1 else blocks[0]


def _attend_block(
    q_BQNH: Float[Array, "B Q N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    start_BQ: Int[Array, "B Q"],
    first_query: int,
    scale: float,
) -> Float[Array, "B Q N H"]:
    B, Q, N, H = q_BQNH.shape
    S, K = k_BSKH.shape[1:3]
    query = first_query + jnp.arange(Q)
    key = jnp.arange(S)
    visible_BQS = (key >= start_BQ[:, :, None]) & (key <= query[:, None])
    q_BQKGH = (q_BQNH * jnp.asarray(scale, q_BQNH.dtype)).reshape(B, Q, K, N // K, H)
    scores_BKGQS = jnp.einsum("bqkgh,bskh->bkgqs", q_BQKGH, k_BSKH).astype(jnp.float32)
    scores_BKGQS = jnp.where(visible_BQS[:, None, None], scores_BKGQS, MASKED)
    probs_BKGQS = jax.nn.softmax(scores_BKGQS, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("bkgqs,bskh->bqkgh", probs_BKGQS, v_BSKH).reshape(B, Q, N, H)
