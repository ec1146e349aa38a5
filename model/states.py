"""Parts of all mixers that keep a state of every sequence: the state itself, a causal convolution, and sums
of decays.

Letters: B rows, T tokens, C channels, W taps of the convolution but one, Q tokens of a chunk, G groups of
heads, R heads of a group.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class State(NamedTuple):
    """The memory that a row's next token reads: the heads' matrices, and the last inputs of the
    convolution, oldest first. Both are float32."""

    matrix: Float[Array, "B G R K V"]
    tail: Float[Array, "B W C"]


def where_alive(alive_B: Bool[Array, " B"], new: State, old: State) -> State:
    """Return the new states of rows that are alive, and the old ones of the others."""

    def chosen(new: Array, old: Array) -> Array:
        return jnp.where(alive_B.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

    return jax.tree.map(chosen, new, old)


def accumulated(
    decay: Float[Array, "*batch Q G R"],
) -> tuple[Float[Array, "*batch Q G R"], Float[Array, "*batch G R Q Q"]]:
    """Return the sum of each token's decay and those before it in the chunk, and the differences of these
    sums, of token i less token j.

    The sums of a chunk may reach hundreds, and the difference of two is then less exact than the decays
    between them. So multiples of 1/256 are summed by themselves: their sums and differences are exact in
    float32, and the sums of what is left are small."""
    coarse = jax.lax.stop_gradient(jnp.round(256 * decay) / 256)
    coarse, fine = (jnp.cumsum(part, axis=-3) for part in (coarse, decay - coarse))

    def differences(sums: Array) -> Array:
        by_head = jnp.moveaxis(sums, -3, -1)
        return by_head[..., :, None] - by_head[..., None, :]

    return coarse + fine, differences(coarse) + differences(fine)


def convolved(
    x_BTC: Float[Array, "B T C"],
    kernel_C1W: Float[Array, "C 1 taps"],
    bias_C: Float[Array, " C"] | None,
    start_BT: Int[Array, "B T"],
) -> Float[Array, "B T C"]:
    """Return silu of the causal convolution of each channel, over the tokens of each segment.

    It is rounded to x's dtype before silu and after it, as in transformers."""
    T, taps = x_BTC.shape[1], kernel_C1W.shape[-1]
    x32, kernel_CW = x_BTC.astype(jnp.float32), kernel_C1W[:, 0].astype(jnp.float32)
    mixed = x32 * kernel_CW[:, -1]
    for back in range(1, min(taps, T)):
        reaches = (jnp.arange(T) - back >= start_BT)[..., None]
        shifted = jnp.pad(x32[:, :-back], ((0, 0), (back, 0), (0, 0)))
        mixed = mixed + jnp.where(reaches, shifted, 0) * kernel_CW[:, -1 - back]
    return _activated(mixed, bias_C, x_BTC.dtype)


def convolved_on(
    x_BTC: Float[Array, "B T C"],
    kernel_C1W: Float[Array, "C 1 taps"],
    bias_C: Float[Array, " C"] | None,
    tail_BWC: Float[Array, "B W C"],
    real_BT: Bool[Array, "B T"],
) -> tuple[Float[Array, "B T C"], Float[Array, "B W C"]]:
    """Return `convolved` of rows that go on from a tail, and the tail after the `real` tokens, which come
    first."""
    W = tail_BWC.shape[1]
    whole = jnp.concatenate([tail_BWC.astype(x_BTC.dtype), x_BTC], axis=1)
    mixed = convolved(whole, kernel_C1W, bias_C, jnp.zeros(whole.shape[:2], jnp.int32))[:, W:]
    tail = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, W))(whole, real_BT.sum(1))
    return mixed, tail.astype(jnp.float32)


def convolved_one(
    x_B1C: Float[Array, "B 1 C"],
    kernel_C1W: Float[Array, "C 1 taps"],
    bias_C: Float[Array, " C"] | None,
    tail_BWC: Float[Array, "B W C"],
) -> tuple[Float[Array, "B 1 C"], Float[Array, "B W C"]]:
    """Return `convolved` of one token of each row, and the tail after it."""
    window = jnp.concatenate([tail_BWC, x_B1C.astype(jnp.float32)], axis=1)
    mixed_BC = jnp.einsum("bwc,cw->bc", window, kernel_C1W[:, 0].astype(jnp.float32))
    return _activated(mixed_BC[:, None], bias_C, x_B1C.dtype), window[:, 1:]


def _activated(mixed: Array, bias_C: Array | None, dtype: jnp.dtype) -> Array:
    mixed = mixed if bias_C is None else mixed + bias_C.astype(jnp.float32)
    return jax.nn.silu(mixed.astype(dtype).astype(jnp.float32)).astype(dtype)
