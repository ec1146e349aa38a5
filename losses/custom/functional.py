"""The losses of torch.nn.functional in JAX. Parameters have torch's names; deprecated ones must be None."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from .activations import magnitude, xlogy
from .dtypes import align, as_float
from .elementwise import ELEMENTWISE
from .reductions import log_softmax, softmax


def _reduced(elements: Float[Array, "*N"], reduction: str, weight: Any, deprecated: dict[str, Any]) -> Array:
    if weight is not None or any(value is not None for value in deprecated.values()):
        raise ValueError("weight, size_average and reduce are not supported; use `reduction`")
    if reduction == "none":
        return elements
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; it must be none, mean or sum")
    return jnp.mean(elements) if reduction == "mean" else jnp.sum(elements)


def mse_loss(
    input: Array, target: Array, reduction: str = "mean", weight: Any = None, **deprecated: Any
) -> Array:
    left, right = align(input, target)
    return _reduced(jnp.square(left - right), reduction, weight, deprecated)


def l1_loss(
    input: Array, target: Array, reduction: str = "mean", weight: Any = None, **deprecated: Any
) -> Array:
    left, right = align(input, target)
    return _reduced(magnitude(left - right), reduction, weight, deprecated)


def huber_loss(
    input: Array, target: Array, reduction: str = "mean", delta: float = 1.0, weight: Any = None
) -> Array:
    """x² / 2 where |x| < delta, delta (|x| - delta / 2) beyond."""
    left, right = align(input, target)
    x = magnitude(left - right)
    return _reduced(jnp.where(x < delta, 0.5 * x * x, delta * (x - 0.5 * delta)), reduction, weight, {})


def smooth_l1_loss(
    input: Array,
    target: Array,
    reduction: str = "mean",
    beta: float = 1.0,
    weight: Any = None,
    **deprecated: Any,
) -> Array:
    """x² / (2 beta) where |x| < beta, |x| - beta / 2 beyond."""
    if beta == 0:
        return l1_loss(input, target, reduction, weight, **deprecated)
    left, right = align(input, target)
    x = magnitude(left - right)
    return _reduced(jnp.where(x < beta, 0.5 * x * x / beta, x - 0.5 * beta), reduction, weight, deprecated)


def kl_div(
    input: Array, target: Array, reduction: str = "mean", log_target: bool = False, **deprecated: Any
) -> Array:
    """target (log target - input), elementwise. With `log_target`, the target is given as a log-prob."""
    log_q, p = align(input, target)
    elements = jnp.exp(p) * (p - log_q) if log_target else xlogy(p, p) - p * log_q
    if reduction == "batchmean":
        return _reduced(elements, "sum", None, deprecated) / input.shape[0]
    return _reduced(elements, reduction, None, deprecated)


def binary_cross_entropy_with_logits(
    input: Array,
    target: Array,
    weight: Any = None,
    reduction: str = "mean",
    pos_weight: Any = None,
    **deprecated: Any,
) -> Array:
    """-(target log sigmoid(x) + (1 - target) log sigmoid(-x))."""
    if pos_weight is not None:
        raise ValueError("pos_weight is not supported")
    x, y = (as_float(each) for each in align(input, target))
    log_sigmoid = ELEMENTWISE["log_sigmoid"]
    return _reduced(-(y * log_sigmoid(x) + (1 - y) * log_sigmoid(-x)), reduction, weight, deprecated)


def activation(name: str) -> Callable[..., Array]:
    def apply(input: Array, *options: Any, inplace: bool = False, **named: Any) -> Array:
        if inplace:
            raise ValueError("in-place operations are not supported in custom losses")
        return ELEMENTWISE[name](input, *options, **named)

    return apply


FUNCTIONAL: dict[str, Callable[..., Any]] = {
    "mse_loss": mse_loss,
    "l1_loss": l1_loss,
    "huber_loss": huber_loss,
    "smooth_l1_loss": smooth_l1_loss,
    "kl_div": kl_div,
    "binary_cross_entropy_with_logits": binary_cross_entropy_with_logits,
    "softmax": softmax,
    "log_softmax": log_softmax,
    **{
        name: activation(name)
        for name in ("relu", "leaky_relu", "elu", "silu", "sigmoid", "tanh", "softplus")
    },
    "logsigmoid": activation("log_sigmoid"),
}
