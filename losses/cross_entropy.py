"""Weighted negative log-likelihood."""

from jaxtyping import Array, Float

from .loss import Loss


def cross_entropy(logprobs: Float[Array, "*N"], weights: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """-w · log p(target); weights are real numbers of either sign.

    With (N, K) targets this is distillation from a teacher's top K: -Σ_k w_k · log p(target_k). The loss is
    linear in the log-probs, so it also carries the gradient of any loss that a client computes itself
    (weights = -dLoss/dlogprob). Source: Tinker documentation, "Losses".
    """
    return -weights * logprobs


LOSS = Loss(
    "cross_entropy", cross_entropy, inputs=("weights",), config={}, valid="weights", multi_target=True
)
