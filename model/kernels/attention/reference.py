"""Attention in plain XLA with both loops rolled: for any device, and the reference for the other backends.

The loop over blocks of queries visits, for each, the blocks of keys from the smallest start of its queries to
the diagonal, with FlashAttention's running softmax (arXiv:2205.14135). Memory grows with T, not with T^2, and
the program's size does not grow with T.

Letters: B rows, T tokens, N query heads, K kv heads, G = N / K query heads per kv head, H head dim, Q queries
of one block, S keys of one block.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MASKED = -1e30
_BLOCK = 512


def forward(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    start_BT: Int[Array, "B T"],
    scale: float,
    block: int = _BLOCK,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Return the output and the log-sum-exp of each query's scores."""
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    G, size = N // K, min(block, T)
    q, k, v = (_padded(x, size) for x in (q_BTNH, k_BTKH, v_BTKH))
    start = _padded_start(start_BT, size)

    def queries(index: Array) -> tuple[Array, Array]:
        q_BQKGH = _block(q, index, size).reshape(B, size, K, G, H)
        start_BQ = _block(start, index, size)

        def keys(at: Array, carry: tuple) -> tuple:
            top_BKGQ, total_BKGQ, sum_BKGQH = carry
            k_BSKH, v_BSKH = _block(k, at, size), _block(v, at, size)
            z = _scores(q_BQKGH, k_BSKH, scale)
            z = jnp.where(_visible(start_BQ, index, at, size)[:, None, None], z, MASKED)
            higher = jnp.maximum(top_BKGQ, z.max(-1))
            weights = jnp.exp(z - higher[..., None])
            shrink = jnp.exp(top_BKGQ - higher)
            mixed = _dot("bkgqs,bskh->bkgqh", weights.astype(v_BSKH.dtype), v_BSKH)
            total = total_BKGQ * shrink + weights.sum(-1)
            return higher, total, sum_BKGQH * shrink[..., None] + mixed

        zero = jnp.zeros((B, K, G, size), jnp.float32)
        carry = (zero + 2 * MASKED, zero, jnp.zeros((B, K, G, size, H), jnp.float32))
        top, total, mixed = jax.lax.fori_loop(_first_block(start_BQ, index, size), index + 1, keys, carry)
        out_BQNH = (mixed / total[..., None]).transpose(0, 3, 1, 2, 4).reshape(B, size, N, H)
        return out_BQNH.astype(q.dtype), (top + jnp.log(total)).reshape(B, N, size)

    out, lse = jax.lax.map(queries, jnp.arange(q.shape[1] // size))
    return _joined(out)[:, :T], jnp.moveaxis(lse, 0, 2).reshape(B, N, -1)[..., :T]


def backward(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    start_BT: Int[Array, "B T"],
    scale: float,
    out_BTNH: Float[Array, "B T N H"],
    lse_BNT: Float[Array, "B N T"],
    d_out_BTNH: Float[Array, "B T N H"],
    block: int = _BLOCK,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Compute FlashAttention's backward (appendix B): the probabilities are made again from the log-sum-exp.

    The gradients of k and v are summed in float32 over the blocks of queries."""
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    G, size, dtype = N // K, min(block, T), q_BTNH.dtype
    pull_BTN = (d_out_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32)).sum(-1)
    q, k, v, d_out = (_padded(x, size) for x in (q_BTNH, k_BTKH, v_BTKH, d_out_BTNH))
    # Padded queries have no gradient: exp(score - 0) of a padded query is multiplied by zeros only.
    pull, lse = _padded(pull_BTN, size), _padded(lse_BNT.swapaxes(1, 2), size)
    start = _padded_start(start_BT, size)

    def queries(sums: tuple[Array, Array], index: Array) -> tuple[tuple[Array, Array], Array]:
        q_BQKGH, d_out_BQKGH = (_block(x, index, size).reshape(B, size, K, G, H) for x in (q, d_out))
        pull_BKGQ1, lse_BKGQ1 = (
            _block(x, index, size).reshape(B, size, K, G).transpose(0, 2, 3, 1)[..., None]
            for x in (pull, lse)
        )
        start_BQ = _block(start, index, size)

        def keys(at: Array, carry: tuple) -> tuple:
            dq_BQKGH, dk, dv = carry
            k_BSKH, v_BSKH = _block(k, at, size), _block(v, at, size)
            z = _scores(q_BQKGH, k_BSKH, scale)
            seen = _visible(start_BQ, index, at, size)[:, None, None]
            probs = jnp.where(seen, jnp.exp(z - lse_BKGQ1), 0.0)
            dprobs = _dot("bqkgh,bskh->bkgqs", d_out_BQKGH, v_BSKH)
            dz = (probs * (dprobs - pull_BKGQ1) * scale).astype(dtype)
            dq_BQKGH += _dot("bkgqs,bskh->bqkgh", dz, k_BSKH)
            dk = _added(dk, at, size, _dot("bkgqs,bqkgh->bskh", dz, q_BQKGH))
            dv = _added(dv, at, size, _dot("bkgqs,bqkgh->bskh", probs.astype(dtype), d_out_BQKGH))
            return dq_BQKGH, dk, dv

        carry = (jnp.zeros((B, size, K, G, H), jnp.float32), *sums)
        dq, *sums = jax.lax.fori_loop(_first_block(start_BQ, index, size), index + 1, keys, carry)
        return tuple(sums), dq.reshape(B, size, N, H).astype(dtype)

    zeros = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    (dk, dv), dq = jax.lax.scan(queries, zeros, jnp.arange(q.shape[1] // size))
    return _joined(dq)[:, :T], dk[:, :T].astype(dtype), dv[:, :T].astype(dtype)


def _first_block(start_BQ: Int[Array, "B Q"], index: Array, size: int) -> Array:
    """Return the first block of keys that any query of the block sees; at the latest its own."""
    return jnp.minimum(start_BQ.min() // size, index)


def _visible(start_BQ: Int[Array, "B Q"], index: Array, at: Array, size: int) -> Bool[Array, "B Q S"]:
    query, key = index * size + jnp.arange(size), at * size + jnp.arange(size)
    return (key >= start_BQ[..., None]) & (key <= query[:, None])


def _scores(q_BQKGH: Array, k_BSKH: Array, scale: float) -> Array:
    return _dot("bqkgh,bskh->bkgqs", q_BQKGH, k_BSKH) * scale


def _padded(x_BT: Array, size: int) -> Array:
    """Pad the tokens with zeros to whole blocks."""
    return jnp.pad(x_BT, [(0, 0), (0, -x_BT.shape[1] % size)] + [(0, 0)] * (x_BT.ndim - 2))


def _padded_start(start_BT: Int[Array, "B T"], size: int) -> Int[Array, "B Z"]:
    """Let every padded query see itself only."""
    T = start_BT.shape[1]
    own = jnp.broadcast_to(jnp.arange(T, T + -T % size, dtype=start_BT.dtype), (len(start_BT), -T % size))
    return jnp.concatenate([start_BT, own], axis=1)


def _block(x_BT: Array, index: Array, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x_BT, index * size, size, axis=1)


def _added(total_BT: Array, index: Array, size: int, addition: Array) -> Array:
    changed = _block(total_BT, index, size) + addition
    return jax.lax.dynamic_update_slice_in_dim(total_BT, changed, index * size, axis=1)


def _joined(x_ZBQ: Array) -> Array:
    """[Z B Q ...] -> [B (Z Q) ...]"""
    Z, B, Q, *rest = x_ZBQ.shape
    return jnp.moveaxis(x_ZBQ, 0, 1).reshape(B, Z * Q, *rest)


def _dot(equation: str, a: Array, b: Array) -> Array:
    """Compute an einsum with float32 sums. This is safe here, because autodiff does not see it."""
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
