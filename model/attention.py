"""Causal attention over packed rows.

One mask serves packing, padding and sliding windows: `start[b, t]`, the first key that query t of row b
can see. Key j is visible to query i if and only if start[b, i] <= j <= i.

Letters: B rows, T tokens, N query heads, K kv heads, G = N / K query heads per kv head, H head dim,
Q queries of one block, S keys that a block sees, M = G Q.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MASKED = -1e30
"""The score of a masked key.

It is finite, so that a row without a visible key gives a mean of values, not NaN."""

_QUERY_BLOCKS = 4
_SMALLEST_BLOCK = 64


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    start_BT: Int[Array, "B T"],
    scale: float,
) -> Float[Array, "B T N H"]:
    """Return softmax(scale * q k^T + mask) v, with grouped heads. Scores and softmax are float32.

    The queries are cut into a few blocks, and each block reads only the keys up to its own end. This saves
    nearly half of the work, the part above the diagonal. The backward recomputes the scores instead of
    storing them.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    q_BKGTH = (q_BTNH * jnp.asarray(scale, q_BTNH.dtype)).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k_BKTH, v_BKTH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    out_BKGTH = _attend(q_BKGTH, k_BKTH, v_BKTH, start_BT)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def attend_parts(
    q_STNH: Float[Array, "S T N H"],
    parts: list[tuple[Array, Array, Array]],
    scale: float,
) -> Float[Array, "S T N H"]:
    """Return softmax(scale * q k^T) v over C keys held in several arrays of S rows. The softmax is float32.

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
    weights = [jnp.exp(z - highest) for z in found]
    total = sum(w.sum(-1, keepdims=True) for w in weights)
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


@jax.custom_vjp
def _attend(
    q_BKGTH: Float[Array, "B K G T H"],
    k_BKTH: Float[Array, "B K T H"],
    v_BKTH: Float[Array, "B K T H"],
    start_BT: Int[Array, "B T"],
) -> Float[Array, "B K G T H"]:
    return _attend_forward(q_BKGTH, k_BKTH, v_BKTH, start_BT)[0]


def _attend_forward(q_BKGTH: Array, k_BKTH: Array, v_BKTH: Array, start_BT: Array) -> tuple[Array, tuple]:
    """Return the output and what the backward needs: the inputs, the output and each query's log-sum-exp."""
    B, K, G, T, H = q_BKGTH.shape
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
    return out_BKGTH, (q_BKGTH, k_BKTH, v_BKTH, start_BT, out_BKGTH, lse_BKGT)


def _attend_backward(kept: tuple, dout_BKGTH: Array) -> tuple[Array, Array, Array, None]:
    """Compute FlashAttention's backward (arXiv:2205.14135, appendix B), with keys before queries.

    With scores as [S, M], every large operand of every product is used in the layout in which it was made: no
    [T, T] transposes.
    """
    q_BKGTH, k_BKTH, v_BKTH, start_BT, out_BKGTH, lse_BKGT = kept
    B, K, G, T, H = q_BKGTH.shape
    dtype = q_BKGTH.dtype
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
    return jnp.concatenate(dqs, axis=3).astype(dtype), dk.astype(dtype), dv.astype(dtype), None


_attend.defvjp(_attend_forward, _attend_backward)


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
