"""The functions, methods and attributes that a custom loss may use. Everything else is refused.

Functions are listed by the qualified names of `torch.fx`, methods and attributes by those of `torch.Tensor`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .dtypes import is_array, is_number
from .elementwise import ELEMENTWISE, where
from .functional import FUNCTIONAL
from .graph import PLACEMENT
from .reductions import REDUCTIONS, Selected, norm
from .shapes import CONSTRUCTORS, SHAPE_METHODS, SHAPES, getitem

_ATTRIBUTES: dict[str, Callable[[Any], Any]] = {
    "shape": lambda x: x.shape,
    "ndim": lambda x: x.ndim,
    "dtype": lambda x: x.dtype,
    "device": lambda x: PLACEMENT,
    "T": lambda x: x.T,
    "mT": lambda x: x.mT,
}


def attribute(value: Any, name: Any) -> Any:
    """Return `value.name`, for the attributes that are listed."""
    if isinstance(value, Selected) and name in ("values", "indices"):
        return value.values if name == "values" else value.indices
    if not is_array(value) or name not in _ATTRIBUTES:
        raise ValueError(f"{name!r} is not an attribute that custom losses may read")
    return _ATTRIBUTES[name](value)


def _add(input: Any, other: Any) -> Any:
    """Add two operands, or concatenate two shapes."""
    if isinstance(input, tuple) and isinstance(other, tuple):
        return (*input, *other)
    return ELEMENTWISE["add"](input, other)


def _method_where(input: Any, condition: Any, other: Any) -> Any:
    return where(condition, input, other)


def _linalg_norm(input: Any, ord: Any = None, dim: Any = None, keepdim: bool = False, **dtype: Any) -> Any:
    if dim is None and ord is not None and input.ndim > 1:
        raise ValueError("for matrices only the Frobenius norm is supported")
    return norm(input, ord, dim, keepdim, **dtype)


def _of_numbers(function: Callable[..., float]) -> Callable[..., float]:
    def apply(*numbers: Any) -> float:
        if not all(is_number(number) for number in numbers):
            raise TypeError("functions of math take numbers")
        return function(*(float(number) for number in numbers))

    return apply


_OPERATORS: dict[str, Callable[..., Any]] = {
    **{
        name: ELEMENTWISE[name]
        for name in ["sub", "mul", "neg", "abs", "eq", "ne", "lt", "le", "gt", "ge", "pow"]
    },
    "add": _add,
    "pos": lambda x: x,
    "truediv": ELEMENTWISE["div"],
    "floordiv": ELEMENTWISE["floor_divide"],
    "mod": ELEMENTWISE["remainder"],
    "and_": ELEMENTWISE["bitwise_and"],
    "or_": ELEMENTWISE["bitwise_or"],
    "xor": ELEMENTWISE["bitwise_xor"],
    "invert": ELEMENTWISE["bitwise_not"],
    "matmul": REDUCTIONS["matmul"],
    "getitem": getitem,
}
_SPECIAL: dict[str, Callable[..., Any]] = {
    "expit": ELEMENTWISE["sigmoid"],
    **{name: ELEMENTWISE[name] for name in ("xlogy", "log1p", "expm1", "exp2", "erf")},
    **{name: REDUCTIONS[name] for name in ("logsumexp", "softmax", "log_softmax")},
}
_MATH: dict[str, Callable[..., Any]] = {
    name: _of_numbers(getattr(math, name))
    for name in ("exp", "expm1", "log", "log1p", "log2", "log10", "pow", "sqrt", "tanh")
}
_TENSOR = ELEMENTWISE | REDUCTIONS | SHAPES

FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"torch.{name}": function for name, function in (_TENSOR | CONSTRUCTORS).items()},
    **{f"torch.nn.functional.{name}": function for name, function in FUNCTIONAL.items()},
    **{f"torch._C._special.special_{name}": function for name, function in _SPECIAL.items()},
    **{f"torch.special.{name}": function for name, function in _SPECIAL.items()},
    **{f"operator.{name}": function for name, function in _OPERATORS.items()},
    **{f"math.{name}": of_numbers for name, of_numbers in _MATH.items()},
    "torch._C._nn.softplus": FUNCTIONAL["softplus"],
    "torch._C._nn.log_sigmoid": FUNCTIONAL["logsigmoid"],
    "torch.functional.norm": norm,
    "torch._C._linalg.linalg_norm": _linalg_norm,
    "torch._C._linalg.linalg_vector_norm": norm,
    "getattr": attribute,
    "builtins.getattr": attribute,
}
# Functions that are elementwise in all of their tensors.
POINTWISE = frozenset(
    (
        *ELEMENTWISE.values(),
        *(SHAPES[name] for name in ("zeros_like", "ones_like", "full_like")),
        *(FUNCTIONAL[name] for name in ("relu", "leaky_relu", "elu", "silu", "softplus", "logsigmoid")),
        *(_add, _method_where),
    )
)
METHODS: dict[str, Callable[..., Any]] = _TENSOR | SHAPE_METHODS | {"where": _method_where}
