"""Proximal policy optimisation."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Array, Float

from .loss import Loss, clipped_fraction, clipped_surrogate


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
    log_ratio = logprobs - sampled_logprobs
    return clipped_surrogate(log_ratio, advantages, clip_low_threshold, clip_high_threshold)


def metrics(
    _logprobs: np.ndarray, inputs: Mapping[str, np.ndarray], config: Mapping[str, float]
) -> dict[str, float]:
    """Return the fraction of valid tokens that are clipped."""
    low, high = config["clip_low_threshold"], config["clip_high_threshold"]
    return {"pg_clipfrac:mean": clipped_fraction(inputs["log_ratio"], inputs["advantages"], low, high)}


LOSS = Loss(
    "ppo",
    ppo,
    inputs=("logprobs", "advantages"),
    config={"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
    valid="advantages",
    metrics=metrics,
)
