"""Estimates the work of a custom loss before it runs, in floating point operations or their equivalent."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr

# Cost of one element, as the number of simple operations that take as long on a CPU. Measured for each of the
# functions that a loss may call, and rounded to a power of two: 2^34 of them take one to ten seconds on one
# core. Sorts and scans go over the elements once for each doubling of the length.
_SORTED = 128
_SCANNED = {"cumsum": 8, "cumprod": 8, "cummax": 8, "cummin": 8, "cumlogsumexp": 64}
_INDEXED = 16  # memory is read or written out of order
_TRANSCENDENTAL = 8
_REDUCED = 4

_SORTS = frozenset(("sort", "top_k", "approx_top_k"))
_INDEXING = ("gather", "scatter", "dynamic_", "transpose")
_CHEAP = frozenset(
    ("add", "sub", "mul", "neg", "max", "min", "select_n", "convert_element_type", "and", "or")
)
_FREE = frozenset(("reshape", "squeeze", "stop_gradient", "copy", "broadcast_in_dim"))


def estimate(jaxpr: Jaxpr) -> float:
    """Return the operations of a program, including those of its inner programs."""
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> float:
    name = equation.primitive.name
    inner = [estimate(each) for each in _programs(equation.params)]
    if inner:
        # A `cond` costs as much as its most expensive branch. Every loop here is a `scan` of known length.
        return max(inner) * equation.params.get("length", 1) if name in ("cond", "scan") else sum(inner)
    size = max((_size(variable) for variable in (*equation.invars, *equation.outvars)), default=1)
    if name == "dot_general":
        return 2.0 * _size(equation.outvars[0]) * _contracted(equation)
    if name in _SORTS:
        return _SORTED * size * math.log2(max(2, _longest(equation))) * len(equation.outvars)
    if name in _SCANNED:
        return _SCANNED[name] * size * math.log2(max(2, _longest(equation)))
    if name.startswith(_INDEXING):
        return _INDEXED * float(size)
    if name in _FREE or name in _CHEAP:
        return float(size)
    return float(_REDUCED if name.startswith("reduce_") else _TRANSCENDENTAL) * size


def _contracted(equation: Any) -> int:
    (left, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return math.prod(shape[axis] for axis in left)


def _longest(equation: Any) -> int:
    """Return the length of the longest axis that the operation may run along."""
    return max(equation.invars[0].aval.shape, default=1)


def _size(variable: Any) -> int:
    return math.prod(getattr(variable.aval, "shape", ()))


def _programs(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for each in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(each, ClosedJaxpr):
                yield each.jaxpr
            elif isinstance(each, Jaxpr):
                yield each
