"""Evaluates a custom loss in JAX, node by node, with the functions of a fixed table.

`evaluate` is pure, so that `jax.value_and_grad` and `jax.jit` apply. It must run with 64-bit types, as torch
does.

Axis letters: N target tokens of a datum, K targets per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .dtypes import category, is_array, is_number
from .graph import CustomLossError, Graph, Node, Placement, Ref, decode
from .operations import FUNCTIONS, METHODS, POINTWISE
from .zero_slopes import with_zero_slopes

MAX_ELEMENTS = 1 << 24  # in one tensor
MAX_ELEMENTS_IN_ALL = 1 << 26  # in the tensors of all nodes, for one datum
MAX_DIMENSIONS = 8
MAX_TUPLE = 1 << 10  # elements of a tuple

__all__ = ["CustomLossError", "Graph", "evaluate", "load"]


Apply = Callable[[Callable[..., Any], list[Any], dict[str, Any]], Any]


class NotPaddableError(Exception):
    """The loss must see its datum without padding (`padding`)."""


def load(data: bytes, inputs: Sequence[tuple[str, int]]) -> Graph:
    """Decode an uploaded graph.

    Raises CustomLossError naming the node that calls what is not in the tables."""
    return decode(data, inputs, FUNCTIONS, METHODS)


def evaluate(
    graph: Graph, values: Mapping[str, Any], apply: Apply | None = None
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Return the loss and the metrics of one datum. `values` are the inputs by name: `logprobs` [N] or [N,
    K].

    Raises CustomLossError naming the node that cannot be computed or whose tensors are too large. Only shapes
    decide that, so under `jax.jit` it is raised before anything is computed. `apply(function, args, kwargs)`
    calls a function whose arguments may be more than tensors (`padding`).
    """
    environment: dict[str, Any] = {}
    elements = 0
    for node in graph.nodes:
        result = values[node.target] if node.op == "placeholder" else _call(node, environment, apply)
        elements += _size(node, result)
        if elements > MAX_ELEMENTS_IN_ALL:
            raise CustomLossError(f"{node}: the tensors up to here have over {MAX_ELEMENTS_IN_ALL} elements")
        environment[node.name] = result
    loss = environment[graph.loss]
    if not is_array(loss) or loss.shape != () or category(loss.dtype) != 2:
        raise CustomLossError(
            f"the loss, node {graph.loss!r}, is {_described(loss)}; it must be a scalar float"
        )
    metrics = {key: _metric(key, environment[name]) for key, name in graph.metrics.items()}
    return loss, metrics


def _call(node: Node, environment: dict[str, Any], apply: Apply | None) -> Any:
    function = (FUNCTIONS if node.op == "call_function" else METHODS)[node.target]
    args = [_resolved(arg, environment) for arg in node.args]
    kwargs = {_renamed(key): _resolved(arg, environment) for key, arg in node.kwargs.items()}
    try:
        if apply is not None:
            return apply(function, args, kwargs)
        return (
            with_zero_slopes(function, args, kwargs) if function in POINTWISE else function(*args, **kwargs)
        )
    except NotPaddableError:
        raise
    except Exception as error:  # a client's arguments can make the functions and JAX raise anything
        first_line = str(error).partition("\n")[0][:300]
        raise CustomLossError(f"{node}: {first_line}") from None


def _renamed(key: str) -> str:
    """Return torch's name of a parameter; torch also accepts NumPy's names."""
    return {"axis": "dim", "keepdims": "keepdim"}.get(key, key)


def _resolved(argument: Any, environment: dict[str, Any]) -> Any:
    match argument:
        case Ref(name):
            return environment[name]
        case list():
            return [_resolved(each, environment) for each in argument]
        case tuple():
            return tuple(_resolved(each, environment) for each in argument)
        case dict():
            return {key: _resolved(each, environment) for key, each in argument.items()}
        case slice():
            bounds = (argument.start, argument.stop, argument.step)
            return slice(*(_resolved(each, environment) for each in bounds))
    return argument


def _size(node: Node, value: Any) -> int:
    """Count the elements of a node's value.

    Raises CustomLossError for a value that is too large or not valid."""
    value = getattr(value, "array", value)  # padding.Tokens has an array
    if is_array(value):
        if value.ndim > MAX_DIMENSIONS or value.size > MAX_ELEMENTS:
            raise CustomLossError(
                f"{node}: a tensor of shape {list(value.shape)}; it may have {MAX_DIMENSIONS} dimensions and "
                f"{MAX_ELEMENTS} elements"
            )
        return int(value.size)
    if isinstance(value, tuple):
        if len(value) > MAX_TUPLE:  # checked before the elements: adding a tuple to itself doubles it
            raise CustomLossError(f"{node}: a tuple of {len(value)} elements; it may have {MAX_TUPLE}")
        return sum(_size(node, each) for each in value)
    if is_number(value) and abs(value) >= 1 << 63 and isinstance(value, int):
        raise CustomLossError(f"{node}: a whole number beyond 64 bits")
    if not is_number(value) and not isinstance(value, (Placement, jnp.dtype)):
        raise CustomLossError(f"{node}: its value is {_described(value)}, which custom losses do not have")
    return 1


def _metric(key: str, value: Any) -> Float[Array, ""]:
    if not is_array(value) or value.size != 1:
        raise CustomLossError(f"metric {key!r} is {_described(value)}; it must be a tensor of one element")
    return jax.lax.stop_gradient(value.reshape(()).astype(jnp.float64))


def _described(value: Any) -> str:
    if is_array(value):
        return f"{value.dtype}{list(value.shape)}"
    return f"a {type(value).__name__}"
