"""Draws tokens from logits: temperature, top-k, top-p, min-p, and reproducible counter-based randomness.

Nothing here sorts the vocabulary. Filters become one threshold on the logits per row. It is found from the 64
largest logits if these suffice, else by an exact bisection over float32 bit patterns. A token is drawn by
inverting the cumulative distribution in two levels: first a block of the vocabulary, then a token in it.

Axis letters: S sequences, V vocabulary, K most likely tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

TOP_K = 64  # most likely tokens examined before the exact bisection is needed; also the most ever reported
_BLOCK = 256  # tokens per block of the two-level inverse CDF
_LEAST_MASS = 1e-30  # the least top_p; as it approaches 0, only the most likely token is left
_LEAST_TEMPERATURE = 1e-30  # keeps logits / temperature finite; far above it, the draw is already the argmax
_LARGEST_TEMPERATURE = 1e38  # far below it, the distribution is already uniform


class Drawing(Enum):
    """The assumptions about a batch under which its program is compiled."""

    AT_RUN_TIME = "at run time"
    """Nothing is known: what no row wants is skipped by branches."""
    PLAIN = "plain"
    """No row has top_k or top_p, and top tokens are not wanted."""
    FILTERED = "filtered"
    """Everything is computed for all rows, without branches: a GPU would wait for the host at each."""

    def branch(self, condition: Bool[Array, ""], yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
        """Return yes() or no()."""
        if self is Drawing.AT_RUN_TIME:
            return jax.lax.cond(condition, yes, no)
        return jax.tree.map(lambda one, other: jnp.where(condition, one, other), yes(), no())


class SamplingRows(NamedTuple):
    """One row of parameters per sequence. All are traced, so that new values do not compile anything.

    `temperature` 0 is greedy; `top_k` < 1, `top_p` >= 1 and `min_p` <= 0 mean off.
    """

    temperature: Float[Array, " S"]
    top_k: Int[Array, " S"]
    top_p: Float[Array, " S"]
    min_p: Float[Array, " S"]


class Drawn(NamedTuple):
    """Tokens, their log-probs, and the top tokens (only filled if requested).

    Log-probs are of the distribution after temperature (and penalties, if any), before filters."""

    tokens: Int[Array, " S"]
    logprobs: Float[Array, " S"]
    top_tokens: Int[Array, "S K"]
    top_logprobs: Float[Array, "S K"]


def sample_tokens(
    logits: Float[Array, "S V"],
    rows: SamplingRows,
    u: Float[Array, "S 2"],
    want_top: Bool[Array, ""],
    drawing: Drawing = Drawing.AT_RUN_TIME,
) -> Drawn:
    """Draw one token per row of float32 logits, from two uniforms in [0, 1) each.

    p = softmax(logits / temperature), restricted first to the top_k largest, then to the smallest set of
    tokens whose renormalised mass reaches top_p (ties at either border are kept), and to those at least min_p
    times as likely as the most likely one (arXiv:2407.01082). The draw is by inverse CDF. Log-probs are of
    the tempered distribution before all filters. At temperature 0, the token is the argmax and its log-prob
    is of the distribution at temperature 1.
    """
    greedy = rows.temperature <= 0.0
    z = _tempered(logits, rows.temperature)
    log_normalizer = jnp.log(jnp.exp(z).sum(-1))

    filtered = ~greedy & ((rows.top_k > 0) | (rows.top_p < 1.0))
    K = min(TOP_K, z.shape[-1])
    top_z, top_tokens = jnp.zeros((z.shape[0], K), z.dtype), jnp.zeros((z.shape[0], K), jnp.int32)
    threshold = jnp.full(z.shape[:1], -jnp.inf, z.dtype)
    if drawing is not Drawing.PLAIN:
        top_z, top_tokens = drawing.branch(
            want_top | filtered.any(), lambda: tuple(jax.lax.top_k(z, K)), lambda: (top_z, top_tokens)
        )
        threshold = drawing.branch(
            filtered.any(),
            lambda: jnp.where(filtered, keep_threshold(z, top_z, rows.top_k, rows.top_p, drawing), -jnp.inf),
            lambda: threshold,
        )
    threshold = jnp.maximum(threshold, jnp.log(rows.min_p))
    weights = jnp.where(z >= threshold[:, None], jnp.exp(z), 0.0)
    drawn = invert_cdf(weights, u)
    tokens = drawing.branch(  # an argmax takes as long as everything else here
        greedy.any(),
        lambda: jnp.where(greedy, jnp.argmax(logits, axis=-1), drawn),
        lambda: drawn,
    ).astype(jnp.int32)
    return Drawn(
        tokens=tokens,
        logprobs=jnp.take_along_axis(z, tokens[:, None], axis=-1)[:, 0] - log_normalizer,
        top_tokens=top_tokens.astype(jnp.int32),
        top_logprobs=top_z - log_normalizer[:, None],
    )


def _tempered(logits: Float[Array, "S V"], temperature: Float[Array, " S"]) -> Float[Array, "S V"]:
    """Return (logits - their maximum) / temperature, undivided at temperature 0.

    The maximum is subtracted first: at low temperatures, the rounding of a quotient alone would overflow
    float32's exponential.
    """
    divisor = jnp.where(temperature <= 0.0, 1.0, jnp.maximum(temperature, _LEAST_TEMPERATURE))
    return (logits - logits.max(-1, keepdims=True)) / divisor[:, None]


def float32_temperature(temperature: float) -> float:
    """Convert a temperature for `SamplingRows`: 0 is greedy, and no other value rounds to 0."""
    return min(max(temperature, _LEAST_TEMPERATURE), _LARGEST_TEMPERATURE) if temperature > 0 else 0.0


def draw_many(
    logits: Float[Array, "S V"], temperature: Float[Array, " S"], u: Float[Array, "S A 2"]
) -> Int[Array, "S A"]:
    """Draw A tokens per row, independently and without filters, from two uniforms each.

    Temperature 0 is greedy."""
    greedy = temperature <= 0.0
    weights = jnp.exp(_tempered(logits, temperature))
    drawn = jax.vmap(invert_cdf, in_axes=(None, 1), out_axes=1)(weights, u)
    return jnp.where(greedy[:, None], jnp.argmax(logits, axis=-1)[:, None], drawn).astype(jnp.int32)


def uniforms(seed: int, sample_index: int, position: int, count: int) -> Float[np.ndarray, "count 2"]:
    """Return the uniforms in [0, 1) for `count` tokens of one sample from `position` on, made on the host.

    They come from Philox, keyed by the 64-bit seed and the sample's index, with the token's position in its
    sequence as the counter. So a draw depends on these three alone: not on other samples in the batch, on how
    decoding is cut into chunks, or on the backend.
    """
    bits = np.random.Philox(key=seed | sample_index << 64, counter=position).random_raw(4 * count)
    # 24 bits, so that the largest value is still below 1 in float32
    return (bits.reshape(count, 4)[:, :2] >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def invert_cdf(weights: Float[Array, "S V"], u: Float[Array, "S 2"]) -> Int[Array, " S"]:
    """Draw index v with probability weights[v] / sum(weights), from two uniforms; never one with weight zero.

    The first uniform picks a block of the vocabulary by its mass, the second a token within it. This needs
    only two short cumulative sums, and has a finer resolution than one float32 uniform over the whole
    vocabulary.
    """
    S, V = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -V % _BLOCK))).reshape(S, -1, _BLOCK)
    block = _pick(blocks.sum(-1), u[:, 0])
    within = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * _BLOCK + _pick(within, u[:, 1])


def _pick(mass: Float[Array, "S M"], u: Float[Array, " S"]) -> Int[Array, " S"]:
    cumulative = jnp.cumsum(mass, axis=-1)
    below = (cumulative <= u[:, None] * cumulative[:, -1:]).sum(-1)
    picked = jnp.minimum(below, mass.shape[-1] - 1)
    # Rounding of the cumulative sums may point at an entry without mass.
    empty = jnp.take_along_axis(mass, picked[:, None], axis=-1)[:, 0] <= 0.0
    return jnp.where(empty, jnp.argmax(mass, axis=-1), picked)


def keep_threshold(
    z: Float[Array, "S V"],
    top_z: Float[Array, "S K"],
    top_k: Int[Array, " S"],
    top_p: Float[Array, " S"],
    drawing: Drawing = Drawing.AT_RUN_TIME,
) -> Float[Array, " S"]:
    """Return the smallest logit that top_k and then top_p keep; tokens with z below it are removed.

    `top_z` are the K largest logits in descending order. If they do not decide (top_k > K, or top_p's mass is
    not reached within them), all rows are bisected instead.
    """
    V, K = z.shape[-1], top_z.shape[-1]
    k = jnp.where((top_k < 1) | (top_k > V), V, top_k)
    p = jnp.clip(top_p, _LEAST_MASS, 1.0)
    highest = top_z[:, :1]

    k_within = k <= K
    k_threshold = jnp.take_along_axis(top_z, jnp.minimum(k, K)[:, None] - 1, axis=-1)
    k_threshold = jnp.where(k_within[:, None], k_threshold, -jnp.inf)
    top_weights = jnp.where(top_z >= k_threshold, jnp.exp(top_z - highest), 0.0)
    # Ties of the k-th logit may lie beyond the K largest: take the mass from all of z.
    k_mass = jnp.where(z >= k_threshold, jnp.exp(z - highest), 0.0).sum(-1, keepdims=True)
    before = jnp.cumsum(top_weights, axis=-1) - top_weights
    kept = (before < p[:, None] * k_mass) & (top_z >= k_threshold)
    last = jnp.maximum(kept.sum(-1, keepdims=True), 1) - 1
    p_threshold = jnp.take_along_axis(top_z, last, axis=-1)
    decided = k_within | (k == V) & ((p >= 1.0) | (kept.sum(-1) < K))
    quick = jnp.where(p >= 1.0, k_threshold[:, 0], p_threshold[:, 0])

    return drawing.branch(decided.all(), lambda: quick, lambda: _bisected_threshold(z, k, p))


def _bisected_threshold(
    z: Float[Array, "S V"], k: Int[Array, " S"], p: Float[Array, " S"]
) -> Float[Array, " S"]:
    """Compute `keep_threshold` for any k and p, by two bisections over the 2^32 ordered float32 values."""
    weights = jnp.exp(z - z.max(-1, keepdims=True))
    k_threshold = _largest_threshold(lambda t: (z >= t).sum(-1) >= k, z)
    k_mass = jnp.where(z >= k_threshold[:, None], weights, 0.0).sum(-1)
    wanted = p * k_mass
    p_threshold = _largest_threshold(lambda t: jnp.where(z >= t, weights, 0.0).sum(-1) >= wanted, z)
    return jnp.maximum(k_threshold, jnp.where(p >= 1.0, k_threshold, p_threshold))


def _largest_threshold(enough, z: Float[Array, "S V"]) -> Float[Array, " S"]:
    """Return the largest float32 t per row with enough(t), where enough is monotone and true at -inf."""

    def halve(_, bounds):
        low, high = bounds  # enough(low), not enough(high), as ordered integers
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        fine = enough(_ordered_to_float(middle)[:, None])
        return jnp.where(fine, middle, low), jnp.where(fine, high, middle)

    S = z.shape[0]
    low = jnp.full((S,), _NEGATIVE_INFINITY, jnp.int32)
    high = jnp.full((S,), _POSITIVE_INFINITY, jnp.int32)
    return _ordered_to_float(jax.lax.fori_loop(0, 32, halve, (low, high))[0])


# Signed integers in the order of the floats: a positive float's bits are that; a negative float's magnitude
# bits are inverted.
_POSITIVE_INFINITY = 0x7F800000
_NEGATIVE_INFINITY = -0x7F800001


def _ordered_to_float(ordered: Int[Array, " S"]) -> Float[Array, " S"]:
    bits = jnp.where(ordered >= 0, ordered, ordered ^ jnp.int32(0x7FFFFFFF))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
