"""Policy gradient with importance sampling."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from .loss import Loss


def importance_sampling(
    logprobs: Float[Array, "*N"], sampled_logprobs: Float[Array, "*N"], advantages: Float[Array, "*N"]
) -> Float[Array, "*N"]:
    """-r · A with r = p / q = exp(logprobs - sampled_logprobs), where q is the sampler's probability.

    The ratio is per token and not clipped. Source: Tinker documentation, "Losses".
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
