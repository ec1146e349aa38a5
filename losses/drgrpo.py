"""Dr. GRPO: a clipped policy gradient with a KL term, summed and never divided by a length."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .loss import Loss, Reference, clipped_fraction, clipped_surrogate

KL_TYPES = ("k1", "k2", "k3")
_LARGEST_LOG_RATIO = 10.0  # bound of the exponent in k3


def kl(log_ratio: Float[Array, "*N"], kl_type: Float[Array, ""] | float) -> Float[Array, "*N"]:
    """Estimate KL(p || ref) from tokens sampled from p, where log_ratio = logprobs - ref_logprobs.

    k1 = log_ratio, k2 = log_ratio²/2, k3 = exp(-log_ratio) - 1 + log_ratio with log_ratio clipped to ±10.
    Source: Schulman 2020, "Approximating KL divergence", http://joschu.net/blog/kl-approx.html.
    """
    x = jnp.clip(-log_ratio, -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
    k3 = jnp.exp(x) - 1 - x
    return jnp.where(kl_type == 0, log_ratio, jnp.where(kl_type == 1, 0.5 * log_ratio**2, k3))


def drgrpo(
    logprobs: Float[Array, "*N"],
    old_logprobs: Float[Array, "*N"],
    advantages: Float[Array, "*N"],
    ref_logprobs: Float[Array, "*N"],
    clip_low: Float[Array, ""] | float,
    clip_high: Float[Array, ""] | float,
    beta: Float[Array, ""] | float,
    kl_type: Float[Array, ""] | float,
) -> Float[Array, "*N"]:
    """max(-r·A, -clip(r, 1 - clip_low, 1 + clip_high)·A) + beta · KL(p || ref) (`kl`).

    r = exp(logprobs - old_logprobs). Unlike GRPO, Dr. GRPO divides neither by lengths nor by standard
    deviations. As in xorl, a token without an advantage (in a prompt, say) is not trained, not even by the KL
    term. Source: Liu et al. 2025 (arXiv:2503.20783), eq. 3; clip_high as in DAPO (arXiv:2503.14476); names
    and defaults as in xorl's documentation.
    """
    loss = clipped_surrogate(logprobs - old_logprobs, advantages, 1 - clip_low, 1 + clip_high)
    # Without a reference, its log-probs are zeros and the ratio may overflow; 0 · inf is not 0.
    divergence = jnp.where(beta == 0, 0.0, beta * kl(logprobs - ref_logprobs, kl_type))
    return loss + divergence


def drgrpo_sequence(
    logprobs: Float[Array, "*N"], sequence_log_ratio: Float[Array, "*N"], *rest: Array
) -> Float[Array, "*N"]:
    """Compute `drgrpo` with ratio_type "sequence".

    r is the ratio of the whole sequence: the exponential of the mean log-ratio over its tokens with a nonzero
    advantage. Its gradient is that of the token's own log-prob (`gspo`). `rest` is as in `drgrpo`."""
    return drgrpo(logprobs, jax.lax.stop_gradient(logprobs) - sequence_log_ratio, *rest)


def metrics(
    logprobs: np.ndarray, inputs: Mapping[str, np.ndarray], config: Mapping[str, float]
) -> dict[str, float]:
    """Return the fraction of valid tokens that are clipped, and their divergence from the reference."""
    low, high = 1 - config["clip_low"], 1 + config["clip_high"]
    clipped = clipped_fraction(inputs["log_ratio"], inputs["advantages"], low, high)
    found = {"clip_fraction:mean": clipped}
    if config["beta"]:
        divergence = kl(jnp.asarray(logprobs - inputs["reference_logprobs"]), config["kl_type"])
        found["kl_ref:mean"] = float(divergence.mean())
    return found


def check(config: Mapping[str, float]) -> str | None:
    """Return what is wrong with the config values, or None."""
    if not 0 <= config["clip_low"] <= 1 or config["clip_high"] < 0:
        return "clip_low must be within 0 and 1, and clip_high at least 0"
    return "beta must be at least 0" if config["beta"] < 0 else None


_TOKEN = Loss(
    "drgrpo",
    drgrpo,
    inputs=("logprobs", "advantages", "reference_logprobs"),
    config={"clip_low": 0.2, "clip_high": 0.28, "beta": 0.0, "kl_type": float(KL_TYPES.index("k3"))},
    valid="advantages",
    reference=Reference("ref_logprobs", when="beta"),
    choices={"kl_type": KL_TYPES},
    check=check,
    metrics=metrics,
)
SEQUENCE = dataclasses.replace(
    _TOKEN,
    function=drgrpo_sequence,
    inputs=("sequence_log_ratio", "advantages", "reference_logprobs"),
    sequence_level=True,
    sequence_mask="advantages",
)
LOSS = dataclasses.replace(_TOKEN, variants={"ratio_type": {"token": _TOKEN, "sequence": SEQUENCE}})
