"""torch's elementwise functions in JAX, with torch's values, dtypes and gradients.

They follow torch where JAX's own functions differ: at the bounds of `clamp`, and at ties. Parameters have
torch's names, so that keyword arguments fit."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from .activations import elu, leaky_relu, lerp, magnitude, nan_to_num, relu, softplus, xlogy
from .dtypes import Operand, align, as_array, as_float, category, is_array, is_number, result_type


def _real(function: Callable[[Array], Array]) -> Callable[[Operand], Array]:
    def apply(input: Operand) -> Array:
        return function(as_float(input))

    return apply


def _kept(function: Callable[[Array], Array]) -> Callable[[Operand], Array]:
    def apply(input: Operand) -> Array:
        return function(as_array(input))

    return apply


def _binary(function: Callable[[Array, Array], Array], of_numbers: Any = None) -> Callable[..., Any]:
    def apply(input: Operand, other: Operand) -> Any:
        if of_numbers is not None and is_number(input) and is_number(other):
            return of_numbers(input, other)
        return function(*align(input, other))

    return apply


def _real_binary(function: Callable[[Array, Array], Array]) -> Callable[[Operand, Operand], Array]:
    def apply(input: Operand, other: Operand) -> Array:
        left, right = align(input, other)
        return function(as_float(left), as_float(right))

    return apply


def _scaled(function: Callable[[Array, Array], Array], of_numbers: Any) -> Callable[..., Any]:
    """Make a function with torch's `alpha`, a factor of the second operand."""

    def apply(input: Operand, other: Operand, *, alpha: Operand = 1) -> Any:
        if is_number(input) and is_number(other) and alpha == 1:
            return of_numbers(input, other)
        left, right = align(input, other)
        return function(left, right if alpha == 1 else right * alpha)

    return apply


def div(input: Operand, other: Operand, *, rounding_mode: str | None = None) -> Any:
    """Return the quotient. For integers it is float32, or, rounded down or towards zero, their own dtype."""
    if rounding_mode == "floor":
        return floor_divide(input, other)
    if rounding_mode not in (None, "trunc"):
        raise ValueError(f"rounding_mode is {rounding_mode!r}; it must be None, 'floor' or 'trunc'")
    if is_number(input) and is_number(other):
        return math.trunc(input / other) if rounding_mode else input / other
    left, right = align(input, other)
    quotient = as_float(left) / as_float(right)
    return jnp.trunc(quotient).astype(left.dtype) if rounding_mode else quotient


floor_divide = _binary(jnp.floor_divide, operator.floordiv)


def pow_(input: Operand, exponent: Operand) -> Any:
    """Return the power. Python numbers are computed as floats, because Python's integers are unbounded."""
    if is_number(input) and is_number(exponent):
        power = math.pow(input, exponent)
        exact = isinstance(input, int) and isinstance(exponent, int) and exponent >= 0 and abs(power) < 2**53
        return int(power) if exact else power
    if is_number(exponent) and exponent == 0:
        return jnp.ones_like(input, result_type(input, exponent))
    if exponent is not True and isinstance(exponent, int) and 0 < exponent <= 16 and is_array(input):
        return (
            jax.lax.integer_pow(input, exponent)
            if category(input.dtype)
            else jnp.power(*align(input, exponent))
        )
    return jnp.power(*align(input, exponent))


def clamp(input: Operand, min: Operand | None = None, max: Operand | None = None) -> Array:
    """min(max(input, min), max); the gradient passes at the bounds."""
    bounds = [bound for bound in (min, max) if bound is not None]
    if not bounds:
        raise ValueError("clamp needs min or max")
    dtype = result_type(input, *bounds)
    x = jnp.asarray(input, dtype)
    if min is not None:
        low = jnp.asarray(min, dtype)
        x = jnp.where(x < low, low, x)
    if max is not None:
        high = jnp.asarray(max, dtype)
        x = jnp.where(x > high, high, x)
    return x


def where(condition: Bool[Array, "*N"], input: Operand, other: Operand) -> Array:
    """`input` where the condition holds, else `other`."""
    if not is_array(condition) or condition.dtype != jnp.bool_:
        raise TypeError("the condition must be a tensor of bools")
    return jnp.where(condition, *align(input, other))


def masked_fill(input: Array, mask: Bool[Array, "*N"], value: Operand) -> Array:
    """`value` where the mask holds, in the input's dtype."""
    return where(mask, jnp.asarray(value, input.dtype), input).astype(input.dtype)


def to(input: Array, *args: Any, **kwargs: Any) -> Array:
    """Convert to a dtype, given by name or as another tensor's. A device is ignored."""
    for argument in (*args, kwargs.get("dtype"), kwargs.get("other")):
        if isinstance(argument, jnp.dtype):
            return input.astype(argument)
        if is_array(argument):
            return input.astype(argument.dtype)
    return input


def _cast(dtype: str) -> Callable[[Array], Array]:
    def apply(input: Array, **_memory_format: Any) -> Array:
        return as_array(input).astype(dtype)

    return apply


def _bits(function: Callable[[Array, Array], Array], of_numbers: Any) -> Callable[..., Any]:
    """Make a bitwise function, of integers and bools only."""

    def apply(input: Operand, other: Operand) -> Any:
        if category(result_type(input, other)) == 2:
            raise TypeError("bits of floating point numbers")
        return _binary(function, of_numbers)(input, other)

    return apply


def invert(input: Array) -> Array:
    if category(input.dtype) == 2:
        raise TypeError("bits of floating point numbers")
    return jnp.invert(input)


def negative(input: Operand) -> Any:
    return -input if is_number(input) else jnp.negative(input)


def absolute(input: Operand) -> Any:
    return abs(input) if is_number(input) else magnitude(input)


def detach(input: Array) -> Array:
    """Return the value without a gradient."""
    return jax.lax.stop_gradient(input)


def identity(input: Array, *_args: Any, **_kwargs: Any) -> Array:
    return input


_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
_JNP_COMPARISONS = (jnp.equal, jnp.not_equal, jnp.less, jnp.less_equal, jnp.greater, jnp.greater_equal)

ELEMENTWISE: dict[str, Callable[..., Any]] = {
    name: _binary(function, getattr(operator, name))
    for name, function in zip(_COMPARISONS, _JNP_COMPARISONS, strict=True)
}
ELEMENTWISE |= {
    **{
        name: _real(getattr(jnp, name))
        for name in [
            "exp",
            "exp2",
            "expm1",
            "log",
            "log2",
            "log10",
            "log1p",
            "sqrt",
            "sin",
            "cos",
            "tan",
            "sinh",
            "cosh",
            "tanh",
            "arctan",
            "arcsin",
            "arccos",
        ]
    },
    **{name: _kept(getattr(jnp, name)) for name in ["floor", "ceil", "trunc", "round", "sign", "square"]},
    **{name: _kept(getattr(jnp, name)) for name in ("isfinite", "isnan", "isinf", "logical_not")},
    "sigmoid": _real(jax.nn.sigmoid),
    "log_sigmoid": _real(jax.nn.log_sigmoid),
    "silu": _real(jax.nn.silu),
    "erf": _real(jax.scipy.special.erf),
    "rsqrt": _real(jax.lax.rsqrt),
    "reciprocal": _real(jnp.reciprocal),
    "relu": relu,
    "leaky_relu": leaky_relu,
    "elu": elu,
    "softplus": softplus,
    "neg": negative,
    "abs": absolute,
    "add": _scaled(jnp.add, operator.add),
    "sub": _scaled(jnp.subtract, operator.sub),
    "mul": _binary(jnp.multiply, operator.mul),
    "div": div,
    "floor_divide": floor_divide,
    "remainder": _binary(jnp.remainder, operator.mod),
    "pow": pow_,
    "minimum": _binary(jnp.minimum),
    "maximum": _binary(jnp.maximum),
    "logaddexp": _real_binary(jnp.logaddexp),
    "atan2": _real_binary(jnp.arctan2),
    "xlogy": xlogy,
    "lerp": lerp,
    "clamp": clamp,
    "clamp_min": lambda input, min: clamp(input, min),
    "clamp_max": lambda input, max: clamp(input, None, max),
    "where": where,
    "masked_fill": masked_fill,
    "nan_to_num": nan_to_num,
    "logical_and": _binary(jnp.logical_and),
    "logical_or": _binary(jnp.logical_or),
    "logical_xor": _binary(jnp.logical_xor),
    "bitwise_and": _bits(jnp.bitwise_and, operator.and_),
    "bitwise_or": _bits(jnp.bitwise_or, operator.or_),
    "bitwise_xor": _bits(jnp.bitwise_xor, operator.xor),
    "bitwise_not": invert,
    "detach": detach,
    "to": to,
    "type_as": lambda input, other: input.astype(other.dtype),
    "clone": identity,
    "contiguous": identity,
}
_ALIASES = {
    "subtract": "sub",
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "negative": "neg",
    "absolute": "abs",
    "not_equal": "ne",
    "less": "lt",
    "less_equal": "le",
    "greater": "gt",
    "greater_equal": "ge",
    "clip": "clamp",
    "atan": "arctan",
    "asin": "arcsin",
    "acos": "arccos",
    "cpu": "clone",
}
_CASTS = {
    "float": "float32",
    "double": "float64",
    "half": "float16",
    "bfloat16": "bfloat16",
    "long": "int64",
    "int": "int32",
    "bool": "bool",
}
ELEMENTWISE |= {alias: ELEMENTWISE[name] for alias, name in _ALIASES.items()}
ELEMENTWISE |= {name: _cast(dtype) for name, dtype in _CASTS.items()}
