"""torch's indexing, views and constructors in JAX. Parameters have torch's names.

An index out of range is an error, as in torch; JAX would clamp it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from .dtypes import align, as_array, category, is_array, is_number, result_type

Sizes = int | Sequence[int]


def getitem(input: Any, index: Any) -> Any:
    """Index a tensor by numbers, slices, None, an ellipsis or integer tensors; or a tuple by a number."""
    if isinstance(input, (tuple, list)):
        if not isinstance(index, (int, slice)):
            raise TypeError("a tuple is indexed by a number or a slice")
        return input[index]
    if not is_array(input):
        raise TypeError("only tensors, shapes and tuples can be indexed")
    parts = list(index) if isinstance(index, tuple) else [index]
    parts = [jnp.asarray(part, jnp.int64) if isinstance(part, list) else part for part in parts]
    taken = sum(1 for part in parts if part is not None and part is not Ellipsis)
    if taken > input.ndim:
        raise IndexError(f"{taken} indices for {input.ndim} dimensions")
    at = 0
    for part in parts:
        if part is Ellipsis:
            at += input.ndim - taken
        elif part is not None:
            _check_index(part, input.shape[at])
            at += 1
    if any(is_array(part) for part in parts):
        return _gathered(input, tuple(parts))
    return input[tuple(parts)]


def _check_index(part: Any, size: int) -> None:
    if isinstance(part, slice):
        if not all(bound is None or isinstance(bound, int) for bound in (part.start, part.stop, part.step)):
            raise TypeError("bounds of a slice must be numbers")
        if part.step is not None and part.step < 1:
            raise ValueError(f"a slice has step {part.step}; it must be at least 1")
    elif is_array(part):
        if part.dtype == jnp.bool_:
            raise TypeError("indexing by a mask gives a shape that depends on values; use torch.where")
        if category(part.dtype) != 1:
            raise TypeError("a tensor index must be of integers")
    elif not isinstance(part, int) or isinstance(part, bool):
        raise TypeError(f"a {type(part).__name__} cannot be an index")
    elif not -size <= part < size:
        raise IndexError(f"index {part} is out of range for a dimension of {size}")


def _gathered(input: Array, index: tuple[Any, ...]) -> Array:
    """Gather along an axis. An index out of range gives NaN, which fails the loss."""
    return input.at[index].get(mode="fill", fill_value=jnp.nan if category(input.dtype) == 2 else None)


def gather(input: Array, dim: int, index: Int[Array, "*N"]) -> Array:
    return jnp.take_along_axis(input, index, axis=dim, mode="fill")


def index_select(input: Array, dim: int, index: Int[Array, " n"]) -> Array:
    return jnp.take(input, index, axis=dim, mode="fill")


def select(input: Array, dim: int, index: int) -> Array:
    _check_index(index, input.shape[dim])
    return jnp.take(input, index, axis=dim)


def narrow(input: Array, dim: int, start: int, length: int) -> Array:
    if not 0 <= start <= start + length <= input.shape[dim]:
        raise IndexError(f"{start} to {start + length} is out of range for a dimension of {input.shape[dim]}")
    return jnp.take(input, jnp.arange(start, start + length), axis=dim)


def sizes(*shape: Any) -> tuple[int, ...]:
    """Return the sizes, given as `(2, 3)` or as `((2, 3),)`."""
    given = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    if not all(isinstance(size, int) for size in given):
        raise TypeError("sizes must be numbers")
    return tuple(given)


def reshape(input: Array, *shape: Any) -> Array:
    return jnp.reshape(input, sizes(*shape))


def expand(input: Array, *shape: Any) -> Array:
    wanted = sizes(*shape)
    kept = (1,) * (len(wanted) - input.ndim) + input.shape
    return jnp.broadcast_to(input, [old if new == -1 else new for new, old in zip(wanted, kept, strict=True)])


def repeat(input: Array, *repeats: Any) -> Array:
    times = sizes(*repeats)
    if len(times) < input.ndim or min(times, default=1) < 0 or math.prod(times) > 1 << 20:
        raise ValueError(f"repeats {list(times)} do not fit a tensor of {input.ndim} dimensions")
    return jnp.tile(input, times)


def flatten(input: Array, start_dim: int = 0, end_dim: int = -1) -> Array:
    if input.ndim == 0:
        return input.reshape(1)
    start, end = start_dim % input.ndim, end_dim % input.ndim
    return input.reshape(*input.shape[:start], -1, *input.shape[end + 1 :])


def unsqueeze(input: Array, dim: int) -> Array:
    return jnp.expand_dims(input, dim)


def squeeze(input: Array, dim: Any = None) -> Array:
    """Remove dimensions of size 1; others stay."""
    if dim is None:
        return jnp.squeeze(input)
    dims = [one % max(1, input.ndim) for one in ((dim,) if isinstance(dim, int) else dim)]
    return jnp.squeeze(input, tuple(one for one in dims if input.ndim and input.shape[one] == 1))


def transpose(input: Array, dim0: int, dim1: int) -> Array:
    return jnp.swapaxes(input, dim0, dim1)


def permute(input: Array, *dims: Any) -> Array:
    return jnp.transpose(input, sizes(*dims))


def t(input: Array) -> Array:
    if input.ndim > 2:
        raise ValueError(f"t() takes at most 2 dimensions, not {input.ndim}")
    return input.T


def cat(tensors: Sequence[Array], dim: int = 0) -> Array:
    return jnp.concatenate(align(*tensors), axis=dim)


def stack(tensors: Sequence[Array], dim: int = 0) -> Array:
    return jnp.stack(align(*tensors), axis=dim)


def flip(input: Array, *dims: Any) -> Array:
    return jnp.flip(input, sizes(*dims))


def roll(input: Array, shifts: Any, dims: Any = None) -> Array:
    return jnp.roll(input, shifts, dims)


def diff(input: Array, n: int = 1, dim: int = -1) -> Array:
    if not 0 <= n <= 8:
        raise ValueError(f"n is {n}; differences of order 0 to 8 are supported")
    return jnp.diff(input, n, axis=dim)


def tril(input: Array, diagonal: int = 0) -> Array:
    return jnp.tril(input, diagonal)


def triu(input: Array, diagonal: int = 0) -> Array:
    return jnp.triu(input, diagonal)


def size(input: Array, dim: int | None = None) -> Any:
    return input.shape if dim is None else input.shape[dim]


def full(shape: Any, fill_value: Any, *, dtype: Any = None, **_placement: Any) -> Array:
    return jnp.full(sizes(shape), fill_value, dtype or result_type(fill_value))


def _filled(value: int) -> Callable[..., Array]:
    def apply(*shape: Any, dtype: Any = None, size: Any = None, **_placement: Any) -> Array:
        return jnp.full(sizes(*shape) if size is None else sizes(size), value, dtype or jnp.float32)

    return apply


def _filled_like(value: int) -> Callable[..., Array]:
    def apply(input: Array, *, dtype: Any = None, **_placement: Any) -> Array:
        return jnp.full(input.shape, value, dtype or input.dtype)

    return apply


def _new_filled(value: int) -> Callable[..., Array]:
    def apply(input: Array, *shape: Any, dtype: Any = None, **_placement: Any) -> Array:
        return jnp.full(sizes(*shape), value, dtype or input.dtype)

    return apply


def full_like(input: Array, fill_value: Any, *, dtype: Any = None, **_placement: Any) -> Array:
    return jnp.full(input.shape, fill_value, dtype or input.dtype)


def new_full(input: Array, shape: Any, fill_value: Any, *, dtype: Any = None, **_placement: Any) -> Array:
    return jnp.full(sizes(shape), fill_value, dtype or input.dtype)


def arange(*bounds: Any, dtype: Any = None, **_placement: Any) -> Array:
    """Return `arange(end)`, `arange(start, end)` or `arange(start, end, step)`, for whole numbers only."""
    if not 1 <= len(bounds) <= 3 or not all(isinstance(bound, int) for bound in bounds):
        raise TypeError("arange takes one to three whole numbers")
    start, stop, step = (0, *bounds, 1) if len(bounds) == 1 else (*bounds, 1)[:3]
    return jnp.arange(start, stop, step, dtype=dtype or jnp.int64)


def tensor(data: Any, *, dtype: Any = None, **_placement: Any) -> Array:
    if not is_number(data):
        raise TypeError("torch.tensor takes one number")
    return as_array(data) if dtype is None else jnp.asarray(data, dtype)


SHAPES: dict[str, Callable[..., Any]] = {
    "gather": gather,
    "take_along_dim": lambda input, indices, dim: gather(input, dim, indices),
    "index_select": index_select,
    "select": select,
    "narrow": narrow,
    "reshape": reshape,
    "flatten": flatten,
    "ravel": lambda input: jnp.ravel(input),
    "unsqueeze": unsqueeze,
    "squeeze": squeeze,
    "transpose": transpose,
    "swapaxes": transpose,
    "permute": permute,
    "t": t,
    "cat": cat,
    "concat": cat,
    "stack": stack,
    "flip": flip,
    "roll": roll,
    "diff": diff,
    "tril": tril,
    "triu": triu,
    "numel": lambda input: input.size,
    "zeros_like": _filled_like(0),
    "ones_like": _filled_like(1),
    "full_like": full_like,
    "broadcast_to": expand,
}
CONSTRUCTORS: dict[str, Callable[..., Any]] = {
    "zeros": _filled(0),
    "ones": _filled(1),
    "full": full,
    "arange": arange,
    "tensor": tensor,
    "as_tensor": lambda data, **options: data if is_array(data) else tensor(data, **options),
}
SHAPE_METHODS: dict[str, Callable[..., Any]] = {
    "size": size,
    "dim": lambda input: input.ndim,
    "view": reshape,
    "expand": expand,
    "expand_as": lambda input, other: expand(input, other.shape),
    "view_as": lambda input, other: reshape(input, other.shape),
    "repeat": repeat,
    "new_zeros": _new_filled(0),
    "new_ones": _new_filled(1),
    "new_full": new_full,
    "new_tensor": lambda input, data, **options: tensor(data, **({"dtype": input.dtype} | options)),
}
