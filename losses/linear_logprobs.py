"""Computes log-probs of target tokens from hidden states, and their gradient, a chunk of tokens at a time.

Logits exist for one chunk at a time, [B, C, V]; `[tokens, vocab]` is never materialised. The gradient is
computed in the same pass. Let z be the logits, p = softmax(z) and g = d loss / d logprob, which an
elementwise loss gives at once. Then

    d loss / d z = g · (onehot(target) - p)        d loss / d hidden = g · (W[target] - p W)

so for any per-token loss a token costs two products with the unembedding, no more than with full logits.
The softmax is float32 whatever the dtype of the weights. Every row is cut in the same places, so that rows
stay on the devices where the mesh put them.

Axis letters: B rows, T tokens in a row, C tokens of a chunk, K targets per token, D hidden, V vocab, R rank,
n adapters in the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

UnembedLora = dict[str, Array]
"""{"a": [n, D, R], "b": [n, R, V], "scale": [n]}, float32."""


class HeadOutput(NamedTuple):
    """The results of one pass over the head."""

    logprobs: Float[Array, "B T K"]
    losses: Float[Array, "B T K"]
    loss: Float[Array, " B"]  # summed over each row
    d_hidden: Float[Array, "B T D"]
    d_unembed: Float[Array, "V D"] | None
    d_lora: UnembedLora | None  # {"a": [n, D, R], "b": [n, R, V]}


class _Chunk(NamedTuple):
    """The forward results of one chunk, including what its backward needs."""

    logprobs: Array  # [B, C, K]
    exponentials: Array  # exp(z - max z) [B, C, V] float32; zero where a logit was not finite
    total: Array  # their sum [B, C]
    low: Array | None  # masked, scaled x A of all adapters side by side [B, C, nR]


def linear_logprobs(
    hidden: Float[Array, "B T D"],
    unembed: Float[Array, "V D"],
    targets: Int[Array, "B T K"],
    lora: UnembedLora | None = None,
    row_adapter: Int[Array, " B"] | None = None,
    chunk_tokens: int = 256,
) -> Float[Array, "B T K"]:
    """Return log softmax(hidden unembedᵀ + adapter)[target] of every target, without a gradient.

    This takes one product with the unembedding per token."""
    mask = _slot_mask(lora, row_adapter)

    def body(_, chunk):
        hidden, targets = chunk
        return None, _forward(hidden, unembed, targets, lora, mask).logprobs

    cuts = _cuts(hidden.shape, targets.shape[2], chunk_tokens)
    _, logprobs = jax.lax.scan(body, None, _cut((hidden, targets), cuts))
    return _join(logprobs)


def linear_logprobs_and_gradient(
    hidden: Float[Array, "B T D"],
    unembed: Float[Array, "V D"],
    targets: Int[Array, "B T K"],
    inputs: Any,
    loss_and_slope: Callable[[Array, Any], tuple[Array, Array]],
    lora: UnembedLora | None = None,
    row_adapter: Int[Array, " B"] | None = None,
    *,
    train_unembed: bool = False,
    chunk_tokens: int = 256,
) -> HeadOutput:
    """Return log-probs, the loss, and its gradient by the hidden states and by the trained parts of the head.

    `loss_and_slope(logprobs [B C K], inputs of the chunk)` gives each token's loss and its derivative by that
    token's log-prob; `inputs` is a pytree of arrays [B, T, ...]. `lora`, if given, is trained. With
    `train_unembed` (full-weight training) the gradient of `unembed` itself is returned too, in float32.
    """
    B, _, D = hidden.shape
    V = unembed.shape[0]
    mask = _slot_mask(lora, row_adapter)
    totals: dict[str, Array] = {}
    if train_unembed:
        totals["unembed"] = jnp.zeros((V, D), jnp.float32)
    if lora is not None:
        n, _, R = lora["a"].shape
        totals["a"] = jnp.zeros((D, n * R), jnp.float32)
        totals["b"] = jnp.zeros((V, n * R), jnp.float32)

    def body(carry, chunk):
        loss_B, totals = carry
        hidden, targets, inputs = chunk
        forward = _forward(hidden, unembed, targets, lora, mask)
        loss, slope = loss_and_slope(forward.logprobs, inputs)
        d_hidden, totals = _backward(hidden, unembed, targets, slope, forward, lora, mask, totals)
        return (loss_B + loss.sum((1, 2)), totals), (forward.logprobs, loss, d_hidden)

    cuts = _cuts(hidden.shape, targets.shape[2], chunk_tokens)
    zero = (jnp.zeros(B, jnp.float32), totals)
    (loss_B, totals), kept = jax.lax.scan(body, zero, _cut((hidden, targets, inputs), cuts))
    logprobs, losses, d_hidden = map(_join, kept)
    d_lora = None
    if lora is not None:
        d_lora = {
            "a": totals["a"].reshape(D, n, R).transpose(1, 0, 2),
            "b": totals["b"].reshape(V, n, R).transpose(1, 2, 0),
        }
    return HeadOutput(logprobs, losses, loss_B, d_hidden, totals.get("unembed"), d_lora)


def _forward(hidden, unembed, targets, lora, mask) -> _Chunk:
    z = jnp.einsum("bcd,vd->bcv", hidden, unembed, preferred_element_type=jnp.float32)
    low = None
    if lora is not None:
        low = jnp.einsum("bcd,dr->bcr", hidden, _a(lora, hidden.dtype), preferred_element_type=jnp.float32)
        low = jnp.where(mask != 0, low * mask, 0.0).astype(hidden.dtype)
        z += jnp.einsum("bcr,rv->bcv", low, _b(lora, hidden.dtype), preferred_element_type=jnp.float32)
    top = z.max(-1, keepdims=True)
    # A row with logits that are not finite must not enter the sums over all rows, as 0 · NaN would.
    exponentials = jnp.where(jnp.isfinite(top), jnp.exp(z - top), 0.0)
    total = exponentials.sum(-1)
    log_total = top[..., 0] + jnp.log(total)
    logprobs = jnp.take_along_axis(z, targets, axis=-1) - log_total[..., None]
    return _Chunk(logprobs, exponentials, total, low)


def _backward(hidden, unembed, targets, slope, forward: _Chunk, lora, mask, totals):
    """Return d loss / d hidden of a chunk, and `totals` plus the chunk's gradients of the head."""
    dtype = unembed.dtype
    exponentials = forward.exponentials.astype(dtype)
    share = slope.sum(-1, keepdims=True) / forward.total[..., None]  # [B, C, 1]
    pulled = jnp.einsum("bcv,vd->bcd", exponentials, unembed, preferred_element_type=jnp.float32)
    towards = jnp.einsum("bck,bckd->bcd", slope, unembed[targets].astype(jnp.float32))
    d_hidden = towards - share * pulled
    totals = dict(totals)
    if "unembed" in totals:
        states = hidden.astype(jnp.float32)
        totals["unembed"] = _add_outer(totals["unembed"], targets, slope, share, states, exponentials, None)
    if lora is not None and forward.low is not None:
        b = _b(lora, dtype)
        d_low = jnp.einsum("bck,rbck->bcr", slope, b[:, targets].astype(jnp.float32))
        d_low -= share * jnp.einsum("bcv,rv->bcr", exponentials, b, preferred_element_type=jnp.float32)
        d_low = jnp.where(mask != 0, d_low * mask, 0.0)
        low = forward.low.astype(jnp.float32)
        totals["b"] = _add_outer(totals["b"], targets, slope, share, low, exponentials, mask)
        states = jnp.where(jnp.isfinite(hidden), hidden, 0)
        totals["a"] += jnp.einsum("bcd,bcr->dr", states, d_low, preferred_element_type=jnp.float32)
        d_hidden += jnp.einsum("bcr,dr->bcd", d_low, _a(lora, jnp.float32))
    return d_hidden.astype(hidden.dtype), totals


def _add_outer(total, targets, slope, share, left, exponentials, mask):
    """Return total [V, X] + Σ over tokens of d loss / d z ⊗ left [B, C, X], only where `mask` is not zero."""
    at_targets = slope[..., None] * left[:, :, None]  # [B, C, K, X]
    shared = left * share
    if mask is not None:  # after the products, because 0 · inf is not 0
        at_targets, shared = (
            jnp.where(mask[:, :, None] != 0, at_targets, 0.0),
            jnp.where(mask != 0, shared, 0.0),
        )
    total = total.at[targets.reshape(-1)].add(at_targets.reshape(-1, left.shape[-1]))
    shared = shared.astype(exponentials.dtype)
    return total - jnp.einsum("bcv,bcx->vx", exponentials, shared, preferred_element_type=jnp.float32)


def _a(lora: UnembedLora, dtype) -> Array:
    """[n, D, R] -> [D, nR]."""
    n, D, R = lora["a"].shape
    return lora["a"].transpose(1, 0, 2).reshape(D, n * R).astype(dtype)


def _b(lora: UnembedLora, dtype) -> Array:
    """[n, R, V] -> [nR, V]."""
    n, R, V = lora["b"].shape
    return lora["b"].reshape(n * R, V).astype(dtype)


def _slot_mask(lora: UnembedLora | None, row_adapter) -> Array | None:
    """Return [B, 1, nR]: the scale of the row's adapter in that adapter's columns, zero elsewhere."""
    if lora is None:
        return None
    n, _, R = lora["a"].shape
    mask = jax.nn.one_hot(row_adapter, n, dtype=jnp.float32) * lora["scale"]
    return jnp.repeat(mask, R, axis=1)[:, None]


def _cuts(shape: tuple[int, ...], targets_per_token: int, chunk_tokens: int) -> int:
    """Return how many equal pieces T is cut into.

    A piece of C tokens has to keep B · C · (targets beyond the first few) within the chunk."""
    B, T, _ = shape
    wanted = max(1, chunk_tokens // (B * max(1, targets_per_token // 16)))
    return next(cuts for cuts in range(1, T + 1) if T % cuts == 0 and T // cuts <= wanted)


def _cut(tree: Any, cuts: int) -> Any:
    """[B, T, ...] -> [cuts, B, C, ...]"""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0], cuts, -1, *x.shape[2:]), 1, 0), tree)


def _join(x: Array) -> Array:
    """[cuts, B, C, ...] -> [B, T, ...]"""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])
