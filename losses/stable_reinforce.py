"""REINFORCE that stays stable when sampler and learner disagree: truncated and masked importance weights."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .loss import Loss


def stable_reinforce(
    logprobs: Float[Array, "*N"],
    sampled_logprobs: Float[Array, "*N"],
    advantages: Float[Array, "*N"],
    mask_low_threshold: Float[Array, ""] | float,
    mask_high_threshold: Float[Array, ""] | float,
    truncation_threshold: Float[Array, ""] | float,
    kl_coeff: Float[Array, ""] | float,
) -> Float[Array, "*N"]:
    """m · (-sg(min(r, truncation)) · logprobs · A + kl_coeff · (r - 1 - log r)), sg = no gradient.

    r = exp(logprobs - sampled_logprobs); m is 1 where low <= r <= high and A is not 0, else 0. A token whose
    ratio is outside the band is dropped: either the policy has moved on, or sampler and trainer disagree on
    numerics. A ratio within the band is a constant weight, truncated so that no token dominates. A token
    without an advantage (in a prompt, say) is not trained, not even by the KL term.

    The formula is OURS: the vendor's `stable_reinforce` is not published, and numbers need not agree with it.
    Its parts are published:
    - the weight, truncated and detached: CISPO, MiniMax-M1 (arXiv:2506.13585), eq. 4, without a lower bound;
      truncation as in IMPALA (arXiv:1802.01561); 2 is the usual constant for sampler-trainer mismatch;
    - the mask, and its band of 0.5 to 5: IcePop, Ring-1T (arXiv:2510.18855);
    - k3, the KL estimator: Schulman 2020, "Approximating KL divergence", used for RL in GRPO
      (arXiv:2402.03300, eq. 4). Tokens come from the sampler q, so the direction is KL(q || p): there both
      r - 1 - log r and its gradient, r - 1, are unbiased up to the mask, and bounded by it.
    """
    log_ratio = logprobs - sampled_logprobs
    ratio = jnp.exp(log_ratio)
    kept = (ratio >= mask_low_threshold) & (ratio <= mask_high_threshold)
    log_ratio = jnp.where(kept, log_ratio, 0.0)  # a dropped token's ratio may overflow; 0 · inf is not 0
    ratio = jnp.exp(log_ratio)
    weight = jax.lax.stop_gradient(jnp.minimum(ratio, truncation_threshold))
    loss = -weight * logprobs * advantages + kl_coeff * (ratio - 1 - log_ratio)
    return jnp.where(kept, loss, 0.0)


LOSS = Loss(
    "stable_reinforce",
    stable_reinforce,
    inputs=("logprobs", "advantages"),
    config={
        "mask_low_threshold": 0.5,
        "mask_high_threshold": 5.0,
        "truncation_threshold": 2.0,
        "kl_coeff": 0.0,
    },
    valid="advantages",
)
