"""Group sequence policy optimisation.

Axis letters: B rows, T tokens in a row.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from . import ppo
from .loss import Loss, clipped_surrogate


def gspo(
    logprobs: Float[Array, "*N"],
    sequence_log_ratio: Float[Array, "*N"],
    advantages: Float[Array, "*N"],
    clip_low_threshold: Float[Array, ""] | float,
    clip_high_threshold: Float[Array, ""] | float,
) -> Float[Array, "*N"]:
    """-min(s_t·A, clip(s_t, low, high)·A), s_t = s · p / sg(p), sg = no gradient.

    s = exp(mean over the mask of (logprobs - sampled_logprobs)) is the ratio of the whole sequence. s_t has
    the value of s and the gradient of the token's own log-prob.

    Source: Zheng et al. 2025 (arXiv:2507.18071), the token-level objective GSPO-token (eq. 13 and 14).
    The default thresholds are that paper's clipping ranges, 3e-4 to the left of 1 and 4e-4 to the right.
    """
    log_ratio = sequence_log_ratio + logprobs - jax.lax.stop_gradient(logprobs)
    return clipped_surrogate(log_ratio, advantages, clip_low_threshold, clip_high_threshold)


def sequence_log_ratio(
    logprobs: Float[Array, "B T"],
    sampled_logprobs: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    segment: Int[Array, "B T"],
) -> Float[Array, "B T"]:
    """Return, for each token, the mean of logprobs - sampled_logprobs over the unmasked tokens of its
    sequence.

    `segment` holds the position in the row at which the token's sequence begins. A sequence whose mask is all
    zero has mean 0, which is a ratio of 1.
    """
    counts = (mask != 0).astype(jnp.float32)
    difference = jnp.where(mask != 0, logprobs - sampled_logprobs, 0.0)
    length = logprobs.shape[1]

    def of_row(difference, counts, segment):
        total = jax.ops.segment_sum(difference, segment, num_segments=length)
        count = jax.ops.segment_sum(counts, segment, num_segments=length)
        return (total / jnp.maximum(count, 1.0))[segment]

    return jax.vmap(of_row)(difference, counts, segment)


LOSS = Loss(
    "gspo",
    gspo,
    inputs=("sequence_log_ratio", "advantages"),
    config={"clip_low_threshold": 1 - 3e-4, "clip_high_threshold": 1 + 4e-4},
    valid="advantages",
    sequence_level=True,
    metrics=ppo.metrics,
)
