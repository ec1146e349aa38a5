"""Proximal policy optimisation."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from .loss import Loss


def ppo(
    logprobs: Float[Array, "*N"],
    sampled_logprobs: Float[Array, "*N"],
    advantages: Float[Array, "*N"],
    clip_low_threshold: Float[Array, ""] | float,
    clip_high_threshold: Float[Array, ""] | float,
) -> Float[Array, "*N"]:
    """-min(r·A, clip(r, low, high)·A), r = exp(logprobs - sampled_logprobs).

    The thresholds bound the ratio itself (0.8 and 1.2, not an epsilon of 0.2). Source: Schulman et al. 2017
    (arXiv:1707.06347), eq. 7; thresholds as in the Tinker documentation.
    """
    ratio = jnp.exp(logprobs - sampled_logprobs)
    clipped = jnp.clip(ratio, clip_low_threshold, clip_high_threshold)
    return -jnp.minimum(ratio * advantages, clipped * advantages)


LOSS = Loss(
    "ppo",
    ppo,
    inputs=("logprobs", "advantages"),
    config={"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
    valid="advantages",
)
