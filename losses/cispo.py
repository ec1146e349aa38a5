"""Clipped importance-sampling policy optimisation."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .loss import Loss


def cispo(
    logprobs: Float[Array, "*N"],
    sampled_logprobs: Float[Array, "*N"],
    advantages: Float[Array, "*N"],
    clip_low_threshold: Float[Array, ""] | float,
    clip_high_threshold: Float[Array, ""] | float,
) -> Float[Array, "*N"]:
    """-sg(clip(r, low, high)) · logprobs · A, r = exp(logprobs - sampled_logprobs), sg = no gradient.

    The clipped ratio is a constant weight; unlike in PPO, no token loses its gradient. Source: MiniMax-M1
    (arXiv:2506.13585), eq. 4; thresholds as in the Tinker documentation.
    """
    ratio = jnp.exp(logprobs - sampled_logprobs)
    clipped = jnp.clip(ratio, clip_low_threshold, clip_high_threshold)
    return -jax.lax.stop_gradient(clipped) * logprobs * advantages


def metrics(
    _logprobs: np.ndarray, inputs: Mapping[str, np.ndarray], config: Mapping[str, float]
) -> dict[str, float]:
    """Return the fraction of valid tokens whose ratio is clipped."""
    ratio = np.exp(inputs["log_ratio"], dtype=np.float64)
    clipped = (ratio < config["clip_low_threshold"]) | (ratio > config["clip_high_threshold"])
    return {"clip_fraction:mean": float(clipped.mean())}


LOSS = Loss(
    "cispo",
    cispo,
    inputs=("logprobs", "advantages"),
    config={"clip_low_threshold": 0.0, "clip_high_threshold": 4.0},
    valid="advantages",
    metrics=metrics,
    reports=("compute_kl_stats",),
)
