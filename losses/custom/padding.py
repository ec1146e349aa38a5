"""Evaluates a custom loss on a padded datum, so that only a few lengths are compiled.

Not every graph allows padding. It is excluded exactly if everything along the tokens is elementwise, or a
sum, mean, maximum or minimum over them; any other graph raises NotPaddableError while it is traced. The
padding repeats the last token: values that are finite there are finite in the padding too, so multiplying
them by 0 gives 0.

Axis letters: T tokens with padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from .dtypes import category, is_array, summed
from .graph import Graph
from .interpreter import NotPaddableError, evaluate
from .operations import POINTWISE, attribute
from .reductions import REDUCTIONS
from .zero_slopes import with_zero_slopes

_LEAVES_TOKENS = ("dtype", "device", "ndim")  # attributes that do not depend on the tokens


@dataclass(frozen=True)
class Tokens:
    """A tensor whose first axis is the padded tokens."""

    array: Shaped[Array, "*T_K"]


def evaluate_padded(
    graph: Graph,
    values: Mapping[str, Shaped[Array, "*N"]],
    along_tokens: frozenset[str],
    length: Int[Array, ""],
) -> Any:
    """Return what `evaluate` gives for the first `length` tokens. `along_tokens` names the padded inputs.

    Raises NotPaddableError or CustomLossError.
    """
    padded = values["logprobs"].shape[0]
    real = jnp.arange(padded) < length

    def apply(function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> Any:
        given = [*args, *kwargs.values()]
        if any(
            isinstance(part, Tokens) for each in given if isinstance(each, (list, tuple)) for part in each
        ):
            raise NotPaddableError
        if not any(isinstance(each, Tokens) for each in given):
            return function(*args, **kwargs)
        if function in POINTWISE or (function in _PAIRWISE and len(given) == 2 and not _is_dim(given[1])):
            return _pointwise(function, args, kwargs, padded)
        if function is attribute and args[1] in _LEAVES_TOKENS:
            return attribute(args[0].array, args[1])
        if function in _REDUCTIONS and isinstance(args[0], Tokens):
            return _reduced(function, args[0].array, args[1:], kwargs, real, length)
        raise NotPaddableError

    inputs = {name: Tokens(value) if name in along_tokens else value for name, value in values.items()}
    return evaluate(graph, inputs, apply)


def _pointwise(function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any], padded: int) -> Tokens:
    bare = [_bare(each) for each in args], {key: _bare(value) for key, value in kwargs.items()}
    result = with_zero_slopes(function, *bare)
    for each in (*args, *kwargs.values()):
        if isinstance(each, Tokens):
            aligned = each.array.ndim == result.ndim
        else:  # must not broadcast along the tokens' axis
            aligned = not is_array(each) or each.ndim < result.ndim or each.shape[0] == 1
        if not aligned:
            raise NotPaddableError
    if result.shape[0] != padded:
        raise NotPaddableError
    return Tokens(result)


def _reduced(
    function: Callable[..., Any],
    x: Shaped[Array, "*T_K"],
    args: list[Any],
    kwargs: dict[str, Any],
    real: Bool[Array, " T"],
    length: Int[Array, ""],
) -> Any:
    """Reduce over all axes, over the tokens, or over other axes. The last leaves one result per token."""
    dim = args[0] if args else kwargs.get("dim")
    if _is_dim(dim) and dim % x.ndim != 0:
        result = function(x, *args, **kwargs)
        if not is_array(result):
            raise NotPaddableError
        return Tokens(result)
    plain = len(args) <= 1 and not set(kwargs) - {"dim", "keepdim"} and (dim is None or _is_dim(dim))
    if function not in _LEFT_OUT or not plain:
        raise NotPaddableError
    mask = real.reshape(-1, *[1] * (x.ndim - 1))
    if function in (REDUCTIONS["sum"], REDUCTIONS["mean"]):
        if function is REDUCTIONS["mean"] and category(x.dtype) != 2:
            raise NotPaddableError  # fails without padding too
        whole = summed(x, None)
        total = REDUCTIONS["sum"](jnp.where(mask, whole, jnp.zeros((), whole.dtype)), *args, **kwargs)
        if function is REDUCTIONS["sum"]:
            return total
        others = x.size // x.shape[0] if dim is None else 1
        return total / (length * others).astype(x.dtype)
    if category(x.dtype) != 2:
        raise NotPaddableError
    least = -jnp.inf if function in (REDUCTIONS["max"], REDUCTIONS["amax"]) else jnp.inf
    return function(jnp.where(mask, x, jnp.asarray(least, x.dtype)), *args, **kwargs)


def _is_dim(value: Any) -> bool:
    return type(value) is int


def _bare(value: Any) -> Any:
    return value.array if isinstance(value, Tokens) else value


_PAIRWISE = frozenset((REDUCTIONS["max"], REDUCTIONS["min"]))  # these also take two tensors
# Padding can be excluded from these along the tokens. Along other axes all of `_REDUCTIONS` work unchanged.
_LEFT_OUT = frozenset(REDUCTIONS[name] for name in ("sum", "mean", "max", "min", "amax", "amin"))
_REDUCTIONS = (
    frozenset(
        REDUCTIONS[name]
        for name in ("sum", "mean", "amax", "amin", "prod", "logsumexp", "softmax", "log_softmax", "cumsum")
    )
    | _LEFT_OUT
)
