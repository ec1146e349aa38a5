"""What a loss is: an elementwise function of per-token log-probs, and the names of what it needs.

Axis letters: B rows, T tokens in a row, K targets per token, P config values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

MAX_CONFIG = 4  # P; config values of the loss that has most


@dataclass(frozen=True)
class Loss:
    """A loss function by its wire name.

    `function(logprobs, *inputs, *config)` gives the loss of each token; the sum over all tokens and datums is
    the loss, and nothing is normalised. It must be elementwise: each loss depends on its own log-prob only.
    """

    name: str
    function: Callable[..., Array]
    inputs: tuple[str, ...]  # per-token inputs besides target_tokens, in the function's order
    config: Mapping[str, float]  # config keys and their defaults, in the function's order
    valid: str  # the input whose nonzero entries are the loss's valid tokens
    multi_target: bool = False  # takes (N, K) targets
    sequence_level: bool = False  # needs the log-probs of the whole sequence first (`gspo`)

    @property
    def required_inputs(self) -> tuple[str, ...]:
        """The per-token inputs that a datum has to bring, `target_tokens` first."""
        if self.sequence_level:  # sequence_log_ratio is computed from these
            return ("target_tokens", "logprobs", "advantages", "sequence_ratio_mask")
        return ("target_tokens", *self.inputs)


def loss_and_slope(
    losses: tuple[Loss, ...],
    index: Array,
    logprobs: Float[Array, "T K"],
    inputs: dict[str, Float[Array, "T K"]],
    config: Float[Array, " P"],
) -> tuple[Float[Array, "T K"], Float[Array, "T K"]]:
    """The loss of each token, and its derivative by that token's log-prob, of `losses[index]`.

    The index and the config values are traced: another loss or threshold compiles nothing.
    """

    def branch(loss: Loss):
        def evaluate(logprobs, inputs, config):
            arguments = [inputs[name] for name in loss.inputs] + list(config[: len(loss.config)])
            value, pull = jax.vjp(lambda lp: loss.function(lp, *arguments), logprobs)
            return value, pull(jnp.ones_like(value))[0]

        return evaluate

    return jax.lax.switch(index, [branch(loss) for loss in losses], logprobs, inputs, config)
