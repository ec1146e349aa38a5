"""What a loss is: an elementwise function of per-token log-probs, and the names of what it needs.

Axis letters: B rows, T tokens in a row, K targets per token, P config values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

MAX_CONFIG = 7  # P; config values of the loss that has most

Metrics = Callable[[np.ndarray, Mapping[str, np.ndarray], Mapping[str, float]], dict[str, float]]
"""From the valid tokens' log-probs and inputs, and the config values by name. The inputs include
`log_ratio`, the logarithm of the ratio that the loss clips: each token's own, or its whole sequence's."""


@dataclass(frozen=True)
class Reference:
    """Further log-probs of the targets: a datum brings them as `name`, the function takes
    `reference_logprobs`. They are needed where the config value `when` is not 0."""

    name: str
    when: str


@dataclass(frozen=True)
class Loss:
    """A loss function by its wire name.

    `function(logprobs, *inputs, *config)` gives the loss of each token; the sum over all tokens and datums is
    the loss, and nothing is normalised. It must be elementwise: each loss depends on its own log-prob only.
    `loss_and_slope` masks it: the function may return anything, NaN included, where the `valid` input is 0.
    """

    name: str
    function: Callable[..., Array]
    inputs: tuple[str, ...]  # per-token inputs besides target_tokens, in the function's order
    config: Mapping[str, float]  # config keys and their defaults, in the function's order
    valid: str  # the input that is 0 at masked tokens: these add nothing, to the loss or to its gradient
    multi_target: bool = False  # takes (N, K) targets
    sequence_level: bool = False  # needs the log-probs of the whole sequence first (`gspo`)
    sequence_mask: str = "sequence_ratio_mask"  # the input over whose nonzero entries its mean goes
    defaults: Mapping[str, float] = field(default_factory=dict)  # of inputs that a datum may leave out
    reference: Reference | None = None
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # words, each for its place's number
    flags: tuple[str, ...] = ()  # config keys that are true or false
    reports: tuple[str, ...] = ()  # flags that only ask for metrics, and that no function takes
    # Of a config key that no function takes: the loss that each of its words stands for.
    variants: Mapping[str, Mapping[str, Loss]] = field(default_factory=dict)
    check: Callable[[Mapping[str, float]], str | None] | None = None  # what is wrong with config values
    metrics: Metrics | None = None

    @property
    def required_inputs(self) -> tuple[str, ...]:
        """The per-token inputs that a datum has to bring, `target_tokens` first."""
        computed = {"sequence_log_ratio", "reference_logprobs", *self.defaults}
        brought = ["logprobs"] if self.sequence_level else []  # sequence_log_ratio is computed from these
        brought += [name for name in self.inputs if name not in computed]
        brought += [self.sequence_mask] if self.sequence_level else []
        return ("target_tokens", *dict.fromkeys(brought))

    @property
    def keys(self) -> tuple[str, ...]:
        """All config keys."""
        return (*self.config, *self.variants, *self.reports)


def loss_and_slope(
    losses: tuple[Loss, ...],
    index: Array,
    logprobs: Float[Array, "T K"],
    inputs: dict[str, Float[Array, "T K"]],
    config: Float[Array, " P"],
) -> tuple[Float[Array, "T K"], Float[Array, "T K"]]:
    """Return the loss of each token and its derivative by that token's log-prob, for `losses[index]`.

    Both are 0 at masked tokens, whatever placeholder their log-probs are. The index and the config values are
    traced: another loss or threshold compiles nothing.
    """

    def branch(loss: Loss):
        def evaluate(logprobs, inputs, config):
            arguments = [inputs[name] for name in loss.inputs] + list(config[: len(loss.config)])
            value, pull = jax.vjp(lambda lp: loss.function(lp, *arguments), logprobs)
            slope = pull(jnp.ones_like(value))[0]
            kept = inputs[loss.valid] != 0
            # Selected, not multiplied: a placeholder's ratio may overflow, and 0 · inf is not 0.
            return jnp.where(kept, value, 0.0), jnp.where(kept, slope, 0.0)

        return evaluate

    return jax.lax.switch(index, [branch(loss) for loss in losses], logprobs, inputs, config)


def clipped_surrogate(
    log_ratio: Float[Array, "*N"],
    advantages: Float[Array, "*N"],
    low: Float[Array, ""] | float,
    high: Float[Array, ""] | float,
) -> Float[Array, "*N"]:
    """Return -min(r·A, clip(r, low, high)·A), r = exp(log_ratio), A = advantages.

    A clipped token's gradient is 0 even where r overflows. Source: Schulman et al. 2017 (arXiv:1707.06347),
    eq. 7.
    """
    ratio = jnp.exp(log_ratio)
    clipped = ((advantages > 0) & (ratio > high)) | ((advantages < 0) & (ratio < low))
    free = jnp.exp(jnp.where(clipped, 0.0, log_ratio))
    return -jnp.where(clipped, jnp.where(advantages > 0, high, low), free) * advantages


def clipped_fraction(log_ratio: np.ndarray, advantages: np.ndarray, low: float, high: float) -> float:
    """The fraction of tokens to which `clipped_surrogate` gives no gradient: their ratio is over `high` where
    the advantage is positive, under `low` where it is negative."""
    ratio = np.exp(log_ratio, dtype=np.float64)
    return float(np.where(advantages > 0, ratio > high, ratio < low).mean())
