"""A custom loss of a datum that is padded to a longer one, so that few lengths are compiled.

Not every graph allows it. Where all that happens along the tokens is elementwise, or a sum, a mean, a maximum
or a minimum over them, padding is left out exactly; anything else raises NotPaddableError while it is traced.
The padding repeats the last token: whatever is finite there is finite in the padding, and 0 times it is 0.

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

_LEAVES_TOKENS = ("dtype", "device", "ndim")  # attributes that say nothing of the tokens


@dataclass(frozen=True)
class Tokens:
    """A tensor whose first axis are the tokens, padded."""

    array: Shaped[Array, "*T_K"]


def evaluate_padded(
    graph: Graph,
    values: Mapping[str, Shaped[Array, "*N"]],
    along_tokens: frozenset[str],
    length: Int[Array, ""],
) -> Any:
    """`evaluate` of the first `length` tokens. `along_tokens` are the inputs that are padded.

    Raises NotPaddableError, or CustomLossError.
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
        else:  # must not meet the tokens' axis
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
    """Over all axes, over the tokens, or over others; of the latter the result is one per token still."""
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
            raise NotPaddableError  # nor without padding
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


_PAIRWISE = frozenset((REDUCTIONS["max"], REDUCTIONS["min"]))  # of two tensors
# Over the tokens, padding can be left out of these; along other axes all of `_REDUCTIONS` are as they are.
_LEFT_OUT = frozenset(REDUCTIONS[name] for name in ("sum", "mean", "max", "min", "amax", "amin"))
_REDUCTIONS = (
    frozenset(
        REDUCTIONS[name]
        for name in ("sum", "mean", "amax", "amin", "prod", "logsumexp", "softmax", "log_softmax", "cumsum")
    )
    | _LEFT_OUT
)
