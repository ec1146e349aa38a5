"""Direct reward optimisation."""

from jaxtyping import Array, Float

from .loss import Loss


def dro(
    logprobs: Float[Array, "*N"],
    sampled_logprobs: Float[Array, "*N"],
    advantages: Float[Array, "*N"],
    beta: Float[Array, ""] | float,
) -> Float[Array, "*N"]:
    """-(logprobs · A - β/2 · (logprobs - sampled_logprobs)²).

    A quadratic penalty keeps the policy near the sampler. It applies only to tokens with an advantage: at
    others (in a prompt, say) `sampled_logprobs` are placeholders. Source: Richemond et al. 2024
    (arXiv:2405.19107); the default β of 0.05 is the value in the Tinker documentation's example.
    """
    return -(logprobs * advantages - 0.5 * beta * (logprobs - sampled_logprobs) ** 2)


LOSS = Loss(
    "dro",
    dro,
    inputs=("logprobs", "advantages"),
    config={"beta": 0.05},
    valid="advantages",
)
