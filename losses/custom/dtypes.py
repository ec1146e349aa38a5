"""torch's dtypes and how they promote. JAX must run with 64-bit types (`jax.enable_x64`)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Operand = Any  # a tensor or a number

DTYPES = {
    name: jnp.dtype(name)
    for name in [
        "float64",
        "float32",
        "float16",
        "bfloat16",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint8",
        "bool",
    ]
}
_DEFAULTS = (jnp.dtype("bool"), jnp.dtype("int64"), jnp.dtype("float32"))  # by category


def is_array(value: Any) -> bool:
    return isinstance(value, jax.Array)


def is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float))


def category(dtype: Any) -> int:
    """0 of bool, 1 of integers, 2 of floats."""
    if jnp.issubdtype(dtype, jnp.floating):
        return 2
    return 0 if dtype == jnp.bool_ else 1


def result_type(*operands: Any) -> Any:
    """`torch.result_type`: tensors with dimensions before those without before Python's numbers; the latter
    count only where their category (bool, integer, float) is higher."""
    levels: list[Any] = [None, None, None]
    for operand in operands:
        if is_array(operand):
            level, dtype = (0 if operand.ndim else 1), operand.dtype
        elif is_number(operand):
            number = 2 if isinstance(operand, float) else 0 if isinstance(operand, bool) else 1
            level, dtype = 2, _DEFAULTS[number]
        else:
            raise TypeError(f"{_described(operand)} where a tensor or a number is expected")
        levels[level] = dtype if levels[level] is None else jnp.promote_types(levels[level], dtype)
    result = None
    for dtype in levels:
        if result is None:
            result = dtype
        elif dtype is not None and category(dtype) > category(result):
            result = jnp.promote_types(result, dtype)
    return result


def align(*operands: Any) -> list[jax.Array]:
    """As arrays of one dtype."""
    dtype = result_type(*operands)
    return [jnp.asarray(operand, dtype) for operand in operands]


def as_array(value: Any) -> jax.Array:
    """A tensor as it is, a number as torch.tensor(number)."""
    return value if is_array(value) else jnp.asarray(value, result_type(value))


def as_float(value: Any) -> jax.Array:
    """Integers and bools as float32, as torch's functions of real numbers take them."""
    array = as_array(value)
    return array if category(array.dtype) == 2 else array.astype(jnp.float32)


def summed(value: Any, dtype: Any) -> jax.Array:
    """What a sum is taken of: integers and bools as int64, unless a dtype is given."""
    array = as_array(value)
    if dtype is not None:
        return array.astype(dtype)
    return array if category(array.dtype) == 2 else array.astype(jnp.int64)


def _described(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
