"""The gated delta rule (arXiv:2412.06464): attention that is linear in the length, with a state per head.

Each value head has a matrix S that maps keys to values. Token t, with a query q, a key k (both of unit
length), a value v, a decay g <= 0 and a rate beta in (0, 1), changes and reads it:

    S <- e^g S;   u = beta (v - S^T k);   S <- S + k u^T;   o = S^T q / sqrt(d)

Before that, queries, keys and values go through a causal convolution over the last few tokens of each
channel, and silu. `mix_rows` computes whole rows in chunks, which is O(T): inside a chunk the tokens'
corrections u solve a triangular system, and only S passes from chunk to chunk. `mix_one` is the rule itself,
for one token of each row. Everything but the inputs and the output is float32, whatever the dtype.

Reference: transformers' `torch_chunk_gated_delta_rule` and `torch_recurrent_gated_delta_rule`, in
`modeling_qwen3_5`.

Letters: B rows, T tokens, C channels, W taps of the convolution but one, G key heads, R value heads per key
head, K size of keys, V size of values, N chunks, Q tokens of a chunk.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .config import DeltaNet
from .states import State, accumulated, convolved, convolved_on, convolved_one

_CHUNK, _BLOCK = 64, 16
_EPSILON = 1e-6  # inside the root of the length of q and k


class Tokens(NamedTuple):
    """The rule's inputs for each token. `qkv` are the queries, keys and values of all heads side by side,
    before the convolution."""

    qkv_BTC: Float[Array, "B T C"]
    decay_BTGR: Float[Array, "B T G R"]
    rate_BTGR: Float[Array, "B T G R"]


def tokens(
    net: DeltaNet,
    qkv_BTC: Float[Array, "B T C"],
    a_BTH: Float[Array, "B T H"],
    b_BTH: Float[Array, "B T H"],
    a_log_H: Float[Array, " H"],
    dt_bias_H: Float[Array, " H"],
) -> Tokens:
    """Return the tokens with g = -exp(a_log) softplus(a + dt_bias) and beta = sigmoid(b)."""
    a, b, a_log, dt_bias = (x.astype(jnp.float32) for x in (a_BTH, b_BTH, a_log_H, dt_bias_H))
    decay = -jnp.exp(a_log) * jax.nn.softplus(a + dt_bias)
    heads = (net.key_heads, net.value_heads // net.key_heads)
    return Tokens(
        qkv_BTC,
        decay.reshape(*decay.shape[:2], *heads),
        jax.nn.sigmoid(b).reshape(*b.shape[:2], *heads),
    )


def mix_rows(
    net: DeltaNet, of: Tokens, kernel_C1W: Float[Array, "C 1 taps"], start_BT: Int[Array, "B T"]
) -> Float[Array, "B T G R V"]:
    """Mix the tokens of each segment of packed rows; `start_BT` is the first token of each one's segment."""
    q, k, v = _by_head(net, convolved(of.qkv_BTC, kernel_C1W, None, start_BT))
    return _chunked(q, k, v, of.decay_BTGR, of.rate_BTGR, start_BT, None)[0].astype(of.qkv_BTC.dtype)


def mix_on(
    net: DeltaNet,
    of: Tokens,
    kernel_C1W: Float[Array, "C 1 taps"],
    state: State,
    real_BT: Bool[Array, "B T"],
) -> tuple[Float[Array, "B T G R V"], State]:
    """Mix rows that go on from `state`. Returns the state after the `real` tokens, which come first."""
    qkv, tail = convolved_on(of.qkv_BTC, kernel_C1W, None, state.tail, real_BT)
    q, k, v = _by_head(net, qkv)
    decay, rate = (jnp.where(real_BT[..., None, None], x, 0) for x in (of.decay_BTGR, of.rate_BTGR))
    out, matrix = _chunked(q, k, v, decay, rate, jnp.full(real_BT.shape, -1), state.matrix)
    return out.astype(of.qkv_BTC.dtype), State(matrix, tail)


def mix_one(
    net: DeltaNet, of: Tokens, kernel_C1W: Float[Array, "C 1 taps"], state: State
) -> tuple[Float[Array, "B 1 G R V"], State]:
    """Mix one token of each row with what came before it."""
    qkv, tail = convolved_one(of.qkv_BTC, kernel_C1W, None, state.tail)
    q_BGK, k_BGK, v_BGRV = (x[:, 0] for x in _by_head(net, qkv))
    product = partial(jnp.einsum, precision="highest")
    matrix = state.matrix * jnp.exp(of.decay_BTGR[:, 0])[..., None, None]
    expected = product("bgrkv,bgk->bgrv", matrix, k_BGK)
    change = of.rate_BTGR[:, 0, ..., None] * (v_BGRV - expected)
    matrix = matrix + product("bgk,bgrv->bgrkv", k_BGK, change)
    out = product("bgrkv,bgk->bgrv", matrix, q_BGK)
    return out[:, None].astype(of.qkv_BTC.dtype), State(matrix, tail)


def _by_head(net: DeltaNet, qkv_BTC: Array) -> tuple[Array, Array, Array]:
    """Return float32 queries and keys [B T G K], normed and scaled, and values [B T G R V]."""
    size, G = net.key_heads * net.key_dim, net.key_heads
    q, k, v = jnp.split(qkv_BTC.astype(jnp.float32), (size, 2 * size), axis=-1)
    q, k = (x.reshape(*x.shape[:2], G, net.key_dim) for x in (q, k))
    q, k = (x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + _EPSILON) for x in (q, k))
    return q * net.key_dim**-0.5, k, v.reshape(*v.shape[:2], G, -1, net.value_dim)


def _solve(lower: Float[Array, "... Q Q"], right: Float[Array, "... Q M"]) -> Float[Array, "... Q M"]:
    """Solve (I + lower) x = right for a strictly lower `lower`, by substitution in blocks of `_BLOCK` tokens.

    Plain products, which meshes can cut. XLA's own solver is a call for each matrix on a CPU, and on meshes
    of CPU devices it hung (jax 0.10.2).
    """
    product, Q, batch = partial(jnp.matmul, precision="highest"), lower.shape[-1], lower.shape[:-2]
    lower, right = lower.reshape(-1, Q, Q), right.reshape(-1, *right.shape[-2:])
    begins = range(0, Q, _BLOCK)
    blocks = [lower[..., begin : begin + _BLOCK, begin : begin + _BLOCK] for begin in begins]
    inverses = _inverse(jnp.stack(blocks, -3))
    solved: list[Array] = []
    for number, begin in enumerate(begins):
        rows = slice(begin, begin + _BLOCK)
        x = right[..., rows, :]
        if solved:
            x = x - product(lower[..., rows, :begin], jnp.concatenate(solved, -2))
        solved.append(product(inverses[..., number, :, :], x))
    return jnp.concatenate(solved, -2).reshape(*batch, Q, -1)


def _inverse(lower: Float[Array, "... Q Q"]) -> Float[Array, "... Q Q"]:
    """Return (I + lower)^-1, row by row."""
    identity = jnp.broadcast_to(jnp.eye(lower.shape[-1]), lower.shape)
    rows = identity[..., :1, :]
    for at in range(1, lower.shape[-1]):
        change = (lower[..., at, :at, None] * rows).sum(-2, keepdims=True)
        rows = jnp.concatenate([rows, identity[..., at : at + 1, :] - change], -2)
    return rows


def _chunked(
    q_BTGK: Array,
    k_BTGK: Array,
    v_BTGRV: Array,
    decay_BTGR: Array,
    rate_BTGR: Array,
    start_BT: Array,
    first: Array | None,
) -> tuple[Array, Array]:
    """Return the rule's outputs [B T G R V] and its last matrices, in float32.

    Rows begin with the matrices `first`, which tokens with a negative start see; without it, with zeros. A
    token of another segment than the one before it sees zeros.
    """
    B, T, G, R, V = v_BTGRV.shape
    Q = min(_CHUNK, T + -T % _BLOCK)
    product = partial(jnp.einsum, precision="highest")

    def chunks(x: Array, mode: str = "constant") -> Array:
        x = jnp.pad(x, ((0, 0), (0, -T % Q)) + ((0, 0),) * (x.ndim - 2), mode=mode)
        return jnp.moveaxis(x.reshape(B, -1, Q, *x.shape[2:]), 1, 0)

    q, k, v, decay, rate = map(chunks, (q_BTGK, k_BTGK, v_BTGRV, decay_BTGR, rate_BTGR))
    start_NBQ = chunks(start_BT, "edge")  # padding belongs to the last segment, and does not change it
    N = len(q)
    since, apart = accumulated(decay)  # [N B Q G R], [N B G R i j]
    later = jnp.tril(jnp.ones((Q, Q), bool))
    together = (start_NBQ[..., :, None] == start_NBQ[..., None, :]) & later  # [N B i j]
    together = together[:, :, None, None]
    decays = jnp.where(together, jnp.exp(jnp.where(together, apart, 0)), 0)  # [N B G R i j]
    # the tokens whose segment began before the chunk see the matrices that it begins with
    goes_on = start_NBQ < (jnp.arange(N) * Q)[:, None, None]
    carried = jnp.where(goes_on[..., None, None], jnp.exp(since), 0)  # [N B Q G R]
    rates = jnp.moveaxis(rate, 2, -1)[..., None]  # [N B G R Q 1]

    keys = product("nbigk,nbjgk->nbgij", k, k)[:, :, :, None]
    strictly_lower = jnp.tril(rates * keys * decays, -1)
    values = rates * jnp.moveaxis(v, 2, 4)  # [N B G R Q V]
    reads = rates * jnp.moveaxis(carried, 2, -1)[..., None] * jnp.moveaxis(k, 2, 3)[:, :, :, None]
    solved = _solve(strictly_lower, jnp.concatenate([values, reads], -1))
    own, taken = jnp.split(solved, (V,), axis=-1)
    scores = product("nbigk,nbjgk->nbgij", q, k)[:, :, :, None] * decays
    queries = jnp.moveaxis(q[..., None, :] * carried[..., None], 2, 4)  # [N B G R Q K]
    left = decays[..., -1, :]  # what is left of each token at the end of the chunk, in the last segment
    last = carried[:, :, -1]  # what is left of the first matrices
    kept_keys = left[..., None] * jnp.moveaxis(k, 2, 3)[:, :, :, None]  # [N B G R Q K]

    @partial(jax.checkpoint, prevent_cse=False)
    def chunk(matrix: Array, of: tuple[Array, ...]) -> tuple[Array, Array]:
        own, taken, scores, queries, kept_keys, last = of
        change = own - product("bgrqk,bgrkv->bgrqv", taken, matrix)
        out = product("bgrqk,bgrkv->bgrqv", queries, matrix) + product("bgrij,bgrjv->bgriv", scores, change)
        matrix = last[..., None, None] * matrix + product("bgrqk,bgrqv->bgrkv", kept_keys, change)
        return matrix, out

    if first is None:
        first = jnp.zeros((B, G, R, k_BTGK.shape[-1], V))
    matrix, out = jax.lax.scan(chunk, first, (own, taken, scores, queries, kept_keys, last))
    out = jnp.moveaxis(out, (0, 4), (1, 2))  # [B N Q G R V]
    return out.reshape(B, N * Q, G, R, V)[:, :T], matrix
