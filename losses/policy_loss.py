"""Clipped policy gradient with dual clip, IcePop and TIS: xorl's `policy_loss`."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .loss import Loss, Reference, clipped_surrogate


def policy_loss(
    logprobs: Float[Array, "*N"],
    old_logprobs: Float[Array, "*N"],
    advantages: Float[Array, "*N"],
    rollout_logprobs: Float[Array, "*N"],
    eps_clip: Float[Array, ""] | float,
    eps_clip_high: Float[Array, ""] | float,
    eps_clip_c: Float[Array, ""] | float,
    icepop_beta: Float[Array, ""] | float,
    use_tis: Float[Array, ""] | float,
    tis_clip_low: Float[Array, ""] | float,
    tis_clip_high: Float[Array, ""] | float,
) -> Float[Array, "*N"]:
    """m · w · max(-r·A, -clip(r, 1 - eps_clip, 1 + eps_clip_high)·A), r = exp(logprobs - old_logprobs).

    The ratio is bounded by epsilons, where `ppo` has thresholds. For each option, 0 means off:

    - eps_clip_c: where A < 0 the loss is at most -eps_clip_c·A, which bounds r by eps_clip_c (dual clip, Ye
      et al. 2020, arXiv:1912.09729, eq. 5);
    - icepop_beta: m is 0 where r is outside [1/β, β] (IcePop, Ring-1T, arXiv:2510.18855), else 1. xorl masks
      the gradient alone and reports the unmasked loss; here both are masked;
    - use_tis: w = clip(exp(old_logprobs - rollout_logprobs), tis_clip_low, tis_clip_high) corrects for
      differences between the engine that made the rollouts and the trainer (truncated importance sampling,
      Yao et al. 2025, https://fengyao.notion.site/off-policy-rl). w is a constant that weighs loss and
      gradient.

    Source: `policy_loss` in xorl's documentation, for the names and defaults; Schulman et al. 2017
    (arXiv:1707.06347), eq. 7.
    """
    log_ratio = logprobs - old_logprobs
    outside = (icepop_beta > 0) & (jnp.abs(log_ratio) > jnp.log(icepop_beta))
    # The exponentials of dropped and bounded tokens must not overflow, because 0 · inf is not 0.
    log_ratio = jnp.where(outside, 0.0, log_ratio)
    dual = (eps_clip_c > 0) & (advantages < 0)
    log_ratio = jnp.where(dual, jnp.minimum(log_ratio, jnp.log(eps_clip_c)), log_ratio)
    loss = clipped_surrogate(log_ratio, advantages, 1 - eps_clip, 1 + eps_clip_high)
    tis = jnp.clip(jnp.exp(old_logprobs - rollout_logprobs), tis_clip_low, tis_clip_high)
    return jnp.where(outside, 0.0, jnp.where(use_tis > 0, tis, 1.0) * loss)


def metrics(
    logprobs: np.ndarray, inputs: Mapping[str, np.ndarray], config: Mapping[str, float]
) -> dict[str, float]:
    """Return the fractions of valid tokens clipped and masked, and the mean TIS weight before clipping."""
    ratio, advantages = np.exp(inputs["log_ratio"], dtype=np.float64), inputs["advantages"]
    clipped = np.where(advantages > 0, ratio > 1 + config["eps_clip_high"], ratio < 1 - config["eps_clip"])
    if config["eps_clip_c"]:
        clipped |= (advantages < 0) & (ratio > config["eps_clip_c"])
    means = {"pg_clipfrac": clipped}
    if beta := config["icepop_beta"]:
        means["icepop_maskfrac"] = (ratio < 1 / beta) | (ratio > beta)
    if config["use_tis"]:
        tis = np.exp(inputs["logprobs"] - inputs["reference_logprobs"], dtype=np.float64)
        means["tis_mean"] = tis
        means["tis_clipfrac"] = (tis < config["tis_clip_low"]) | (tis > config["tis_clip_high"])
    return {f"{name}:mean": float(values.mean()) for name, values in means.items()}


def check(config: Mapping[str, float]) -> str | None:
    """Return what is wrong with the config values, or None."""
    if not 0 <= config["eps_clip"] <= 1 or config["eps_clip_high"] < 0:
        return "eps_clip must be within 0 and 1, and eps_clip_high at least 0"
    for name in ("eps_clip_c", "icepop_beta"):
        if config[name] and config[name] <= 1:
            return f"{name} is {config[name]}; it must be over 1, or null or 0 for none"
    if not 0 <= config["tis_clip_low"] <= config["tis_clip_high"]:
        return "tis_clip_low must be at least 0 and at most tis_clip_high"
    return None


LOSS = Loss(
    "policy_loss",
    policy_loss,
    inputs=("logprobs", "advantages", "reference_logprobs"),
    config={
        "eps_clip": 0.2,
        "eps_clip_high": 0.2,
        "eps_clip_c": 0.0,
        "icepop_beta": 0.0,
        "use_tis": 0.0,
        "tis_clip_low": 0.1,
        "tis_clip_high": 2.0,
    },
    valid="advantages",
    reference=Reference("rollout_logprobs", when="use_tis"),
    flags=("use_tis",),
    reports=("compute_kl_stats",),
    check=check,
    metrics=metrics,
)
