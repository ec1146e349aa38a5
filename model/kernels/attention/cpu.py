"""Attention for the CPU, in plain XLA that its compiler turns into few large products.

Letters: B rows, T tokens, N query heads, K kv heads, G = N / K query heads per kv head, H head dim, Q queries
of one block, S keys that a block sees, M = G Q.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MASKED = -1e30
"""The score of a masked key.

It is finite, so that a row without a visible key gives a mean of values, not NaN."""

_QUERY_BLOCKS = 4
_SMALLEST_BLOCK = 64
_LARGEST_PIECE = 512  # queries


def forward(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    start_BT: Int[Array, "B T"],
    scale: float,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Return the output and the log-sum-exp of each query's scores.

    The queries are cut into a few blocks, and each block reads only the keys up to its own end. This saves
    nearly half of the work, the part above the diagonal. Blocks of long rows are computed in pieces.
    """
    B, T, N, H = q_BTNH.shape
    q_BKGTH, k_BKTH, v_BKTH = _heads_first(q_BTNH, k_BTKH, v_BTKH, scale)
    K, G = q_BKGTH.shape[1:3]
    parts = []
    for begin, end, Q in _blocks(T):
        k_BKSH, v_BKSH = k_BKTH[:, :, :end], v_BKTH[:, :, :end]

        def piece(_: None, of: tuple, k_BKSH: Array = k_BKSH, v_BKSH: Array = v_BKSH) -> tuple[None, tuple]:
            q_BKGQH, start_BQ, query_BQ = of
            Q, S = start_BQ.shape[1], k_BKSH.shape[2]
            scores_BKMS = _dot("bkmh,bksh->bkms", q_BKGQH.reshape(B, K, G * Q, H), k_BKSH)
            visible_BQS = _visible(start_BQ, query_BQ, S)
            scores = jnp.where(visible_BQS[:, None, None], scores_BKMS.reshape(B, K, G, Q, S), MASKED)
            top = scores.max(-1, keepdims=True)
            weights = jnp.exp(scores - top)
            total = weights.sum(-1, keepdims=True)
            weights_BKMS = weights.astype(v_BKSH.dtype).reshape(B, K, G * Q, S)
            out_BKMH = _dot("bkms,bksh->bkmh", weights_BKMS, v_BKSH)
            out_BKGQH = (out_BKMH.reshape(B, K, G, Q, H) / total).astype(q_BKGQH.dtype)
            return None, (out_BKGQH, (top + jnp.log(total))[..., 0])

        of_block = (q_BKGTH[:, :, :, begin:end], start_BT[:, begin:end], _queries(B, begin, end))
        parts.append(_by_pieces(piece, None, of_block, (3, 1, 1), (3, 3), Q)[1])
    out_BKGTH, lse_BKGT = (jnp.concatenate(part, axis=3) for part in zip(*parts, strict=True))
    return _tokens_first(out_BKGTH), lse_BKGT.reshape(B, N, T)


def backward(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    start_BT: Int[Array, "B T"],
    scale: float,
    out_BTNH: Float[Array, "B T N H"],
    lse_BNT: Float[Array, "B N T"],
    d_out_BTNH: Float[Array, "B T N H"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Compute FlashAttention's backward (arXiv:2205.14135, appendix B), with keys before queries.

    It computes the scores again instead of storing them. With scores as [S, M], every large operand of every
    product is used in the layout in which it was made: no [T, T] transposes.
    """
    B, T, _, H = q_BTNH.shape
    dtype = q_BTNH.dtype
    q_BKGTH, k_BKTH, v_BKTH = _heads_first(q_BTNH, k_BTKH, v_BTKH, scale)
    K, G = q_BKGTH.shape[1:3]
    out_BKGTH, dout_BKGTH = (
        x.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4) for x in (out_BTNH, d_out_BTNH)
    )
    lse_BKGT = lse_BNT.reshape(B, K, G, T)
    pull_BKGT = (dout_BKGTH.astype(jnp.float32) * out_BKGTH.astype(jnp.float32)).sum(-1)
    dk = jnp.zeros(k_BKTH.shape, jnp.float32)
    dv = jnp.zeros(v_BKTH.shape, jnp.float32)
    dqs = []
    for begin, end, Q in _blocks(T):
        k_BKSH, v_BKSH = k_BKTH[:, :, :end], v_BKTH[:, :, :end]

        def piece(sums: tuple, of: tuple, k_BKSH: Array = k_BKSH, v_BKSH: Array = v_BKSH) -> tuple:
            q_BKGQH, dout_BKGQH, lse_BKGQ, pull_BKGQ, start_BQ, query_BQ = of
            Q, S = start_BQ.shape[1], k_BKSH.shape[2]
            M = G * Q
            q_BKMH, dout_BKMH = (x.reshape(B, K, M, H) for x in (q_BKGQH, dout_BKGQH))
            lse_BK1M, pull_BK1M = (x.reshape(B, K, 1, M) for x in (lse_BKGQ, pull_BKGQ))
            visible_BSQ = _visible(start_BQ, query_BQ, S).swapaxes(1, 2)
            visible_B1SM = jnp.tile(visible_BSQ, (1, 1, G))[:, None]
            scores_BKSM = _dot("bksh,bkmh->bksm", k_BKSH, q_BKMH)
            probs_BKSM = jnp.where(visible_B1SM, jnp.exp(scores_BKSM - lse_BK1M), 0.0)
            dprobs_BKSM = _dot("bksh,bkmh->bksm", v_BKSH, dout_BKMH)
            dscores_BKSM = (probs_BKSM * (dprobs_BKSM - pull_BK1M)).astype(dtype)
            dk = sums[0].at[:, :, :S].add(_dot("bksm,bkmh->bksh", dscores_BKSM, q_BKMH))
            dv = sums[1].at[:, :, :S].add(_dot("bksm,bkmh->bksh", probs_BKSM.astype(dtype), dout_BKMH))
            dq_BKHM = _dot("bkhs,bksm->bkhm", k_BKSH.swapaxes(2, 3), dscores_BKSM)
            return (dk, dv), (dq_BKHM.swapaxes(2, 3).reshape(B, K, G, Q, H),)

        heads = (x[:, :, :, begin:end] for x in (q_BKGTH, dout_BKGTH, lse_BKGT, pull_BKGT))
        of_block = (*heads, start_BT[:, begin:end], _queries(B, begin, end))
        (dk, dv), (dq,) = _by_pieces(piece, (dk, dv), of_block, (3, 3, 3, 3, 1, 1), (3,), Q)
        dqs.append(dq)
    dq_BTNH = _tokens_first(jnp.concatenate(dqs, axis=3).astype(dtype)) * jnp.asarray(scale, dtype)
    return dq_BTNH, dk.astype(dtype).swapaxes(1, 2), dv.astype(dtype).swapaxes(1, 2)


def _heads_first(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, scale: float) -> tuple[Array, Array, Array]:
    """Return scaled q [B K G T H], k [B K T H] and v [B K T H]."""
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    q_BTKGH = (q_BTNH * jnp.asarray(scale, q_BTNH.dtype)).reshape(B, T, K, N // K, H)
    return q_BTKGH.transpose(0, 2, 3, 1, 4), k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)


def _tokens_first(x_BKGTH: Array) -> Array:
    """[B K G T H] -> [B T N H]"""
    B, K, G, T, H = x_BKGTH.shape
    return x_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


def _blocks(T: int) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, end, piece) for each block of queries, whose length is a multiple of its piece.

    A block that is shorter than a piece may follow at the end of the row."""
    size = max(_SMALLEST_BLOCK, -(-T // _QUERY_BLOCKS))
    piece = min(size, _LARGEST_PIECE)
    size = -(-size // piece) * piece
    for begin in range(0, T, size):
        end = min(begin + size, T)
        whole = end - (end - begin) % piece
        if begin < whole:
            yield begin, whole, piece
        if whole < end:
            yield whole, end, end - whole


def _by_pieces(
    function: Callable[[Any, tuple[Array, ...]], tuple[Any, tuple[Array, ...]]],
    carry: Any,
    arrays: tuple[Array, ...],
    axes: tuple[int, ...],
    out_axes: tuple[int, ...],
    piece: int,
) -> tuple[Any, tuple[Array, ...]]:
    """Scan `function` over pieces of `arrays`, each cut along its axis, and join its outputs along theirs.

    The scan keeps the scores of one piece at a time in memory. XLA runs independent blocks together, with
    the scores of all of them: their size is quadratic in T, and mapping that much memory anew for every step
    takes longer than computing with it.
    """
    pieces = arrays[0].shape[axes[0]] // piece
    if pieces == 1:
        return function(carry, arrays)

    def cut(x: Array, axis: int) -> Array:
        return jnp.moveaxis(x.reshape(*x.shape[:axis], pieces, piece, *x.shape[axis + 1 :]), axis, 0)

    def join(x: Array, axis: int) -> Array:
        x = jnp.moveaxis(x, 0, axis)
        return x.reshape(*x.shape[:axis], pieces * piece, *x.shape[axis + 2 :])

    carry, outs = jax.lax.scan(function, carry, tuple(map(cut, arrays, axes)))
    return carry, tuple(map(join, outs, out_axes))


def _queries(B: int, begin: int, end: int) -> Int[Array, "B Q"]:
    return jnp.broadcast_to(jnp.arange(begin, end), (B, end - begin))


def _visible(start_BQ: Int[Array, "B Q"], query_BQ: Int[Array, "B Q"], S: int) -> Bool[Array, "B Q S"]:
    key = jnp.arange(S)
    return (key >= start_BQ[..., None]) & (key <= query_BQ[..., None])


def _dot(equation: str, a: Array, b: Array) -> Array:
    """Compute an einsum with float32 sums. This is safe here, because autodiff does not see it."""
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
