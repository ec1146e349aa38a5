"""Defines `Loss`: an elementwise function of per-token log-probs, with the names of its inputs and config.

Axis letters: B rows, T tokens in a row, K targets per token, P config values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

MAX_CONFIG = 7  # P; the most config values of any loss

Metrics = Callable[[np.ndarray, Mapping[str, np.ndarray], Mapping[str, float]], dict[str, float]]
"""Computes metrics from the log-probs and inputs of the valid tokens, and the config values by name. The
inputs include `log_ratio`, the logarithm of the ratio that the loss clips: of each token, or of its whole
sequence."""


@dataclass(frozen=True)
class Reference:
    """Further log-probs of the targets, required where the config value `when` is not 0.

    A datum has them as `name`; the function takes them as `reference_logprobs`."""

    name: str
    when: str


@dataclass(frozen=True)
class Loss:
    """A loss function, under the name that clients use.

    `function(logprobs, *inputs, *config)` returns the loss of each token. The loss of an operation is the sum
    over all tokens and datums, without normalisation. The function must be elementwise: the loss of a token
    depends on that token's log-prob only. `loss_and_slope` masks it, so where the `valid` input is 0 the
    function may return anything, NaN included.
    """

    name: str
    function: Callable[..., Array]
    inputs: tuple[str, ...]  # per-token inputs besides target_tokens, in the function's order
    config: Mapping[str, float]  # config keys and their defaults, in the function's order
    valid: str  # the input that is 0 at masked tokens, which add nothing to the loss or its gradient
    multi_target: bool = False  # takes (N, K) targets
    sequence_level: bool = False  # needs the log-probs of the whole sequence first (`gspo`)
    sequence_mask: str = "sequence_ratio_mask"  # a sequence's mean is over its nonzero entries
    defaults: Mapping[str, float] = field(default_factory=dict)  # for inputs that a datum may leave out
    reference: Reference | None = None
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # words that stand for 0, 1, ...
    flags: tuple[str, ...] = ()  # config keys that are true or false
    reports: tuple[str, ...] = ()  # flags that only request metrics; no function takes them
    # For a config key that no function takes: the loss that each of its values selects.
    variants: Mapping[str, Mapping[str, Loss]] = field(default_factory=dict)
    check: Callable[[Mapping[str, float]], str | None] | None = None  # what is wrong with config values
    metrics: Metrics | None = None

    @property
    def required_inputs(self) -> tuple[str, ...]:
        """The per-token inputs that a datum must have, `target_tokens` first."""
        computed = {"sequence_log_ratio", "reference_logprobs", *self.defaults}
        brought = ["logprobs"] if self.sequence_level else []  # sequence_log_ratio is computed from these
        brought += [name for name in self.inputs if name not in computed]
        brought += [self.sequence_mask] if self.sequence_level else []
        return ("target_tokens", *dict.fromkeys(brought))

    @property
    def keys(self) -> tuple[str, ...]:
        """Return all config keys."""
        return (*self.config, *self.variants, *self.reports)


def loss_and_slope(
    losses: tuple[Loss, ...],
    index: Array,
    logprobs: Float[Array, "T K"],
    inputs: dict[str, Float[Array, "T K"]],
    config: Float[Array, " P"],
) -> tuple[Float[Array, "T K"], Float[Array, "T K"]]:
    """Return the loss of each token and its derivative by that token's log-prob, for `losses[index]`.

    Both are 0 at masked tokens, whatever placeholders their log-probs are. The index and the config values
    are traced, so another loss or threshold does not compile anything.
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

    The gradient of a clipped token is 0, even where r overflows. Source: Schulman et al. 2017
    (arXiv:1707.06347), eq. 7.
    """
    ratio = jnp.exp(log_ratio)
    clipped = ((advantages > 0) & (ratio > high)) | ((advantages < 0) & (ratio < low))
    free = jnp.exp(jnp.where(clipped, 0.0, log_ratio))
    return -jnp.where(clipped, jnp.where(advantages > 0, high, low), free) * advantages


def clipped_fraction(log_ratio: np.ndarray, advantages: np.ndarray, low: float, high: float) -> float:
    """Return the fraction of tokens to which `clipped_surrogate` gives no gradient.

    Their ratio is over `high` and the advantage positive, or under `low` and the advantage negative."""
    ratio = np.exp(log_ratio, dtype=np.float64)
    return float(np.where(advantages > 0, ratio > high, ratio < low).mean())
