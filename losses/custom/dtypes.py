"""torch's dtypes and its promotion rules. JAX must run with 64-bit types (`jax.enable_x64`)."""

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
    """Return 0 for bool, 1 for integers, 2 for floats."""
    if jnp.issubdtype(dtype, jnp.floating):
        return 2
    return 0 if dtype == jnp.bool_ else 1


def result_type(*operands: Any) -> Any:
    """Return the dtype that `torch.result_type` gives.

    Tensors with dimensions decide first, then tensors without dimensions, then Python numbers. A later level
    counts only where its category (bool, integer, float) is higher.
    """
    levels: list[Any] = [None, None, None]
    for operand in operands:
        if is_array(operand):
            level, dtype = (0 if operand.ndim else 1), operand.dtype
        elif is_number(operand):
            number = 2 if isinstance(operand, float) else 0 if isinstance(operand, bool) else 1
            level, dtype = 2, _DEFAULTS[number]
        else:
            raise TypeError(f"expected a tensor or a number, got {_described(operand)}")
        levels[level] = dtype if levels[level] is None else jnp.promote_types(levels[level], dtype)
    result = None
    for dtype in levels:
        if result is None:
            result = dtype
        elif dtype is not None and category(dtype) > category(result):
            result = jnp.promote_types(result, dtype)
    return result


def align(*operands: Any) -> list[jax.Array]:
    """Convert the operands to arrays of one dtype."""
    dtype = result_type(*operands)
    return [jnp.asarray(operand, dtype) for operand in operands]


def as_array(value: Any) -> jax.Array:
    """Return a tensor unchanged, and a number as torch.tensor(number) would."""
    return value if is_array(value) else jnp.asarray(value, result_type(value))


def as_float(value: Any) -> jax.Array:
    """Convert integers and bools to float32, as torch's functions of real numbers do."""
    array = as_array(value)
    return array if category(array.dtype) == 2 else array.astype(jnp.float32)


def summed(value: Any, dtype: Any) -> jax.Array:
    """Convert a summand to the dtype of its sum: int64 for integers and bools, unless a dtype is given."""
    array = as_array(value)
    if dtype is not None:
        return array.astype(dtype)
    return array if category(array.dtype) == 2 else array.astype(jnp.int64)


def _described(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
