"""Attention for the CPU, in plain XLA that its compiler turns into few large products.

Letters: B rows, T tokens, N query heads, K kv heads, G = N / K query heads per kv head, H head dim, Q queries
of one block, S keys that a block sees, M = G Q.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MASKED = -1e30
"""The score of a masked key.

It is finite, so that a row without a visible key gives a mean of values, not NaN."""

_QUERY_BLOCKS = 4
_SMALLEST_BLOCK = 64


def forward(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    start_BT: Int[Array, "B T"],
    scale: float,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Return the output and the log-sum-exp of each query's scores.

    The queries are cut into a few blocks, and each block reads only the keys up to its own end. This saves
    nearly half of the work, the part above the diagonal.
    """
    B, T, N, H = q_BTNH.shape
    q_BKGTH, k_BKTH, v_BKTH = _heads_first(q_BTNH, k_BTKH, v_BTKH, scale)
    K, G = q_BKGTH.shape[1:3]
    outs, lses = [], []
    for begin, end in _blocks(T):
        Q = end - begin
        q_BKMH = q_BKGTH[:, :, :, begin:end].reshape(B, K, G * Q, H)
        scores_BKMS = _dot("bkmh,bksh->bkms", q_BKMH, k_BKTH[:, :, :end])
        visible_BQS = _visible(start_BT, begin, end)
        scores = jnp.where(visible_BQS[:, None, None], scores_BKMS.reshape(B, K, G, Q, end), MASKED)
        top = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        weights_BKMS = weights.astype(v_BKTH.dtype).reshape(B, K, G * Q, end)
        out_BKMH = _dot("bkms,bksh->bkmh", weights_BKMS, v_BKTH[:, :, :end])
        outs.append((out_BKMH.reshape(B, K, G, Q, H) / total).astype(q_BKGTH.dtype))
        lses.append((top + jnp.log(total))[..., 0])
    out_BKGTH, lse_BKGT = jnp.concatenate(outs, axis=3), jnp.concatenate(lses, axis=3)
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
    for begin, end in _blocks(T):
        Q = end - begin
        M = G * Q
        q_BKMH = q_BKGTH[:, :, :, begin:end].reshape(B, K, M, H)
        dout_BKMH = dout_BKGTH[:, :, :, begin:end].reshape(B, K, M, H)
        lse_BK1M = lse_BKGT[..., begin:end].reshape(B, K, 1, M)
        pull_BK1M = pull_BKGT[..., begin:end].reshape(B, K, 1, M)
        k_BKSH, v_BKSH = k_BKTH[:, :, :end], v_BKTH[:, :, :end]
        visible_BSQ = _visible(start_BT, begin, end).swapaxes(1, 2)
        visible_B1SM = jnp.tile(visible_BSQ, (1, 1, G))[:, None]
        scores_BKSM = _dot("bksh,bkmh->bksm", k_BKSH, q_BKMH)
        probs_BKSM = jnp.where(visible_B1SM, jnp.exp(scores_BKSM - lse_BK1M), 0.0)
        dprobs_BKSM = _dot("bksh,bkmh->bksm", v_BKSH, dout_BKMH)
        dscores_BKSM = (probs_BKSM * (dprobs_BKSM - pull_BK1M)).astype(dtype)
        dv = dv.at[:, :, :end].add(_dot("bksm,bkmh->bksh", probs_BKSM.astype(dtype), dout_BKMH))
        dk = dk.at[:, :, :end].add(_dot("bksm,bkmh->bksh", dscores_BKSM, q_BKMH))
        dq_BKHM = _dot("bkhs,bksm->bkhm", k_BKSH.swapaxes(2, 3), dscores_BKSM)
        dqs.append(dq_BKHM.swapaxes(2, 3).reshape(B, K, G, Q, H))
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


def _blocks(T: int) -> Iterator[tuple[int, int]]:
    """Return (begin, end) of each block of queries."""
    size = max(_SMALLEST_BLOCK, -(-T // _QUERY_BLOCKS))
    for begin in range(0, T, size):
        yield begin, min(begin + size, T)


def _visible(start_BT: Int[Array, "B T"], begin: int, end: int) -> Bool[Array, "B Q S"]:
    key = jnp.arange(end)
    return (key >= start_BT[:, begin:end, None]) & (key <= jnp.arange(begin, end)[:, None])


def _dot(equation: str, a: Array, b: Array) -> Array:
    """Compute an einsum with float32 sums. This is safe here, because autodiff does not see it."""
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
