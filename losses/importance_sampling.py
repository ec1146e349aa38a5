"""Policy gradient with importance sampling."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from .loss import Loss


def importance_sampling(
    logprobs: Float[Array, "*N"], sampled_logprobs: Float[Array, "*N"], advantages: Float[Array, "*N"]
) -> Float[Array, "*N"]:
    """-r · A with r = p / q = exp(logprobs - sampled_logprobs), q being the sampler's probability.

    Source: Tinker documentation, "Losses"; per-token ratio, no clipping.
    """
    return -jnp.exp(logprobs - sampled_logprobs) * advantages


LOSS = Loss(
    "importance_sampling",
    importance_sampling,
    inputs=("logprobs", "advantages"),
    config={},
    valid="advantages",
    reports=("compute_kl_stats",),
)
