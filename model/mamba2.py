"""Mamba-2 (arXiv:2405.21060): a state space per head, with decays and inputs that depend on the tokens.

Each head has a matrix S, from N numbers of state to the P numbers of the head. Token t, with inputs x,
vectors B and C that the heads of a group share, and a time step dt > 0, changes and reads it:

    S <- e^(-e^A dt) S + dt x B^T;   y = S C + D x

Before that, x, B and C go through a causal convolution over the last few tokens of each channel, and silu.
`mix_rows` computes whole rows in chunks, which is O(T): inside a chunk every token reads those before it, as
in attention with decays for a mask (section 6 of the paper), and only S passes from chunk to chunk. `mix_one`
is the rule itself, for one token of each row. Everything but the inputs is float32, whatever the dtype.

Reference: transformers' `mamba2_chunk_scan`, in `modeling_nemotron_h`.

Letters: B rows, T tokens, C channels, W taps of the convolution but one, G groups, R heads of a group, P
numbers of a head, N numbers of state, Q tokens of a chunk.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .config import Mamba2
from .states import State, accumulated, convolved, convolved_on, convolved_one

_CHUNK = 64

_product = partial(jnp.einsum, precision="highest")


class Tokens(NamedTuple):
    """The rule's inputs for each token. `xbc` are the inputs of all heads, and B and C of all groups, side
    by side, before the convolution. `decay` is -e^A dt."""

    xbc_BTC: Float[Array, "B T C"]
    step_BTGR: Float[Array, "B T G R"]
    decay_BTGR: Float[Array, "B T G R"]


class Weights(NamedTuple):
    """The convolution, and D."""

    kernel_C1W: Float[Array, "C 1 taps"]
    bias_C: Float[Array, " C"] | None
    skip_H: Float[Array, " H"]


def tokens(
    mamba: Mamba2,
    xbc_BTC: Float[Array, "B T C"],
    dt_BTH: Float[Array, "B T H"],
    a_log_H: Float[Array, " H"],
    dt_bias_H: Float[Array, " H"],
) -> Tokens:
    """Return the tokens with the time step softplus(dt + dt_bias), but at least the smallest one."""
    dt, a_log, dt_bias = (x.astype(jnp.float32) for x in (dt_BTH, a_log_H, dt_bias_H))
    step = jnp.maximum(jax.nn.softplus(dt + dt_bias), mamba.least_step)
    shape = (*dt.shape[:2], mamba.groups, -1)
    return Tokens(xbc_BTC, step.reshape(shape), (-jnp.exp(a_log) * step).reshape(shape))


def mix_rows(
    mamba: Mamba2, of: Tokens, weights: Weights, start_BT: Int[Array, "B T"]
) -> Float[Array, "B T G R P"]:
    """Mix the tokens of each segment of packed rows; `start_BT` is the first token of each one's segment."""
    xbc = convolved(of.xbc_BTC, weights.kernel_C1W, weights.bias_C, start_BT)
    return _chunked(mamba, xbc, of.step_BTGR, of.decay_BTGR, weights, start_BT, None)[0]


def mix_on(
    mamba: Mamba2, of: Tokens, weights: Weights, state: State, real_BT: Bool[Array, "B T"]
) -> tuple[Float[Array, "B T G R P"], State]:
    """Mix rows that go on from `state`. Returns the state after the `real` tokens, which come first."""
    xbc, tail = convolved_on(of.xbc_BTC, weights.kernel_C1W, weights.bias_C, state.tail, real_BT)
    step, decay = (jnp.where(real_BT[..., None, None], x, 0) for x in (of.step_BTGR, of.decay_BTGR))
    start_BT = jnp.full(real_BT.shape, -1)
    out, matrix = _chunked(mamba, xbc, step, decay, weights, start_BT, state.matrix)
    return out, State(matrix, tail)


def mix_one(
    mamba: Mamba2, of: Tokens, weights: Weights, state: State
) -> tuple[Float[Array, "B 1 G R P"], State]:
    """Mix one token of each row with what came before it."""
    xbc, tail = convolved_one(of.xbc_BTC, weights.kernel_C1W, weights.bias_C, state.tail)
    x_BGRP, b_BGN, c_BGN = (part[:, 0] for part in _by_head(mamba, xbc))
    inputs = of.step_BTGR[:, 0, ..., None] * x_BGRP
    matrix = state.matrix * jnp.exp(of.decay_BTGR[:, 0])[..., None, None]
    matrix = matrix + inputs[..., None] * b_BGN[:, :, None, None]
    out = _product("bgrpn,bgn->bgrp", matrix, c_BGN) + _skipped(mamba, weights, x_BGRP)
    return out[:, None], State(matrix, tail)


def _by_head(mamba: Mamba2, xbc_BTC: Array) -> tuple[Array, Array, Array]:
    """Return the heads' inputs [B T G R P], and B and C [B T G N], in float32."""
    before, G = xbc_BTC.shape[:2], mamba.groups
    size = G * mamba.state_dim
    x, b, c = jnp.split(xbc_BTC.astype(jnp.float32), (mamba.width, mamba.width + size), axis=-1)
    x = x.reshape(*before, G, -1, mamba.head_dim)
    return x, b.reshape(*before, G, -1), c.reshape(*before, G, -1)


def _skipped(mamba: Mamba2, weights: Weights, x: Float[Array, "*batch G R P"]) -> Array:
    return weights.skip_H.astype(jnp.float32).reshape(mamba.groups, -1, 1) * x


def _chunked(
    mamba: Mamba2,
    xbc_BTC: Array,
    step_BTGR: Array,
    decay_BTGR: Array,
    weights: Weights,
    start_BT: Array,
    first: Array | None,
) -> tuple[Array, Array]:
    """Return the rule's outputs [B T G R P] and its last matrices.

    Rows begin with the matrices `first`, which tokens with a negative start see; without it, with zeros. A
    token of another segment than the one before it sees zeros.
    """
    (B, T), G, R = start_BT.shape, mamba.groups, mamba.heads // mamba.groups
    Q = min(_CHUNK, T)

    def chunks(x: Array, mode: str = "constant") -> Array:
        x = jnp.pad(x, ((0, 0), (0, -T % Q)) + ((0, 0),) * (x.ndim - 2), mode=mode)
        return jnp.moveaxis(x.reshape(B, -1, Q, *x.shape[2:]), 1, 0)

    per_token = *_by_head(mamba, xbc_BTC), step_BTGR, decay_BTGR
    starts = chunks(start_BT, "edge")  # padding belongs to the last segment, and does not change it
    begins = jnp.arange(len(starts)) * Q
    later = jnp.tril(jnp.ones((Q, Q), bool))

    @partial(jax.checkpoint, prevent_cse=False)
    def chunk(matrix: Array, of: tuple[Array, ...]) -> tuple[Array, Array]:
        x, b, c, step, decay, start, begin = of
        since, apart = accumulated(decay)  # [B Q G R], [B G R i j]
        together = ((start[:, :, None] == start[:, None, :]) & later)[:, None, None]  # [B 1 1 i j]
        decays = jnp.where(together, jnp.exp(jnp.where(together, apart, 0)), 0)  # [B G R i j]
        # the tokens whose segment began before the chunk see the matrices that it begins with
        carried = jnp.where((start < begin)[..., None, None], jnp.exp(since), 0)  # [B Q G R]
        scores = _product("bign,bjgn->bgij", c, b)[:, :, None] * decays
        inputs = step[..., None] * x
        out = _product("bgrij,bjgrp->bigrp", scores, inputs)
        out = out + carried[..., None] * _product("bign,bgrpn->bigrp", c, matrix)
        # what is left of each token's inputs, and of the first matrices, at the end of the chunk
        kept = jnp.moveaxis(decays[..., -1, :], -1, 1)[..., None] * inputs
        matrix = carried[:, -1, ..., None, None] * matrix + _product("bjgrp,bjgn->bgrpn", kept, b)
        return matrix, out + _skipped(mamba, weights, x)

    if first is None:
        first = jnp.zeros((B, G, R, mamba.head_dim, mamba.state_dim))
    matrix, out = jax.lax.scan(chunk, first, (*map(chunks, per_token), starts, begins))
    return jnp.moveaxis(out, 0, 1).reshape(B, -1, *out.shape[3:])[:, :T], matrix
