"""torch's reductions, sorts and matrix products in JAX. Parameters have torch's names."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .activations import magnitude
from .dtypes import align, as_float, category, summed
from .elementwise import ELEMENTWISE
from .scans import cumprod, cumsum, logcumsumexp

Dim = int | tuple[int, ...] | list[int] | None


class Selected(NamedTuple):
    """The pair that torch returns from `max(dim)`, `sort` and `topk`."""

    values: Array
    indices: Int[Array, "*N"]


def axes(dim: Dim) -> Any:
    """Return the axes to reduce over. None and an empty list mean all axes."""
    if isinstance(dim, (list, tuple)):
        return tuple(dim) or None
    return dim


def total(input: Array, dim: Dim = None, keepdim: bool = False, *, dtype: Any = None) -> Array:
    return jnp.sum(summed(input, dtype), axis=axes(dim), keepdims=keepdim)


def mean(input: Array, dim: Dim = None, keepdim: bool = False, *, dtype: Any = None) -> Array:
    """Return the mean, of floats only, as in torch."""
    return jnp.mean(
        _floating(input if dtype is None else input.astype(dtype)), axis=axes(dim), keepdims=keepdim
    )


def prod(input: Array, dim: int | None = None, keepdim: bool = False, *, dtype: Any = None) -> Array:
    return jnp.prod(summed(input, dtype), axis=dim, keepdims=keepdim)


def nansum(input: Array, dim: Dim = None, keepdim: bool = False, *, dtype: Any = None) -> Array:
    return total(jnp.where(jnp.isnan(input), jnp.zeros((), input.dtype), input), dim, keepdim, dtype=dtype)


def nanmean(input: Array, dim: Dim = None, keepdim: bool = False, *, dtype: Any = None) -> Array:
    return nansum(input, dim, keepdim, dtype=dtype) / jnp.sum(
        ~jnp.isnan(input), axis=axes(dim), keepdims=keepdim
    )


def var(
    input: Array,
    dim: Dim | bool = None,
    unbiased: bool | None = None,
    keepdim: bool = False,
    *,
    correction: int | float | None = None,
) -> Float[Array, "*N"]:
    """Return the sum of squared deviations from the mean, divided by n - correction (1 by default)."""
    x = _floating(input)
    if isinstance(dim, bool):  # var(unbiased)
        dim, unbiased = None, dim
    taken = (1 if unbiased in (None, True) else 0) if correction is None else correction
    over = axes(dim)
    deviations = x - jnp.mean(x, axis=over, keepdims=True)
    count = x.size // max(1, math.prod(jnp.sum(x, axis=over).shape)) if x.size else 0
    divisor = jnp.asarray(max(0, count - taken), x.dtype)
    return jnp.sum(deviations * deviations, axis=over, keepdims=keepdim) / divisor


def std(
    input: Array,
    dim: Dim | bool = None,
    unbiased: bool | None = None,
    keepdim: bool = False,
    **correction: Any,
):
    """Return the square root of `var`, with gradient 0 where the variance is 0."""
    return _root(var(input, dim, unbiased, keepdim, **correction))


def norm(
    input: Array,
    p: int | float | str | None = "fro",
    dim: Dim = None,
    keepdim: bool = False,
    out: None = None,
    dtype: Any = None,
) -> Float[Array, "*N"]:
    """(Σ |x|^p)^(1/p), over all elements or along `dim`; p is 1, 2 or infinite."""
    x = _floating(input if dtype is None else input.astype(dtype))
    over = axes(dim)
    if p in ("fro", None, 2):
        return _root(jnp.sum(x * x, axis=over, keepdims=keepdim))
    if p == math.inf:
        return jnp.max(magnitude(x), axis=over, keepdims=keepdim)
    if p == 1:
        return jnp.sum(magnitude(x), axis=over, keepdims=keepdim)
    raise ValueError(f"p is {p!r}; it must be 1, 2 or infinity")


def logsumexp(input: Array, dim: Dim, keepdim: bool = False) -> Float[Array, "*N"]:
    return jax.nn.logsumexp(as_float(input), axis=axes(dim), keepdims=keepdim)


def softmax(
    input: Array, dim: int | None = None, dtype: Any = None, _stacklevel: int = 3
) -> Float[Array, "*N"]:
    return jax.nn.softmax(_given(input, dtype), axis=_needed(dim))


def log_softmax(input: Array, dim: int | None = None, dtype: Any = None, _stacklevel: int = 3):
    return jax.nn.log_softmax(_given(input, dtype), axis=_needed(dim))


def _extreme(reduce: Callable, pick: Callable, pairwise: str) -> Callable[..., Any]:
    def apply(input: Array, dim: Any = None, keepdim: bool = False) -> Any:
        """Reduce all elements, or one dimension to (values, indices), or compare two tensors elementwise."""
        if dim is None:
            return reduce(input)
        if not isinstance(dim, int):
            return ELEMENTWISE[pairwise](input, dim)
        indices = pick(input, axis=dim, keepdims=True)
        values = jnp.take_along_axis(input, indices, axis=dim)
        if keepdim or input.ndim == 0:
            return Selected(values, indices)
        return Selected(jnp.squeeze(values, dim), jnp.squeeze(indices, dim))

    return apply


def _all_extreme(reduce: Callable) -> Callable[..., Array]:
    def apply(input: Array, dim: Dim = None, keepdim: bool = False) -> Array:
        return reduce(input, axis=axes(dim), keepdims=keepdim)

    return apply


def _where_extreme(pick: Callable) -> Callable[..., Array]:
    def apply(input: Array, dim: int | None = None, keepdim: bool = False) -> Int[Array, "*N"]:
        return pick(input, axis=dim, keepdims=keepdim)

    return apply


def _truth(reduce: Callable) -> Callable[..., Array]:
    def apply(input: Array, dim: Dim = None, keepdim: bool = False) -> Array:
        return reduce(input != 0, axis=axes(dim), keepdims=keepdim)

    return apply


def count_nonzero(input: Array, dim: Dim = None) -> Int[Array, "*N"]:
    return jnp.sum(input != 0, axis=axes(dim), dtype=jnp.int64)


def sort(input: Array, dim: int = -1, descending: bool = False, stable: bool = False) -> Selected:
    indices = jnp.argsort(input, axis=dim, stable=True, descending=descending)
    return Selected(jnp.take_along_axis(input, indices, axis=dim), indices)


def argsort(input: Array, dim: int = -1, descending: bool = False, stable: bool = False) -> Int[Array, "*N"]:
    return sort(input, dim, descending).indices


def topk(input: Array, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Selected:
    if not 0 <= k <= input.shape[dim]:
        raise IndexError(f"k is {k}; the dimension has {input.shape[dim]} elements")
    found = sort(input, dim, descending=largest)
    first = [slice(None)] * input.ndim
    first[dim] = slice(k)
    return Selected(found.values[tuple(first)], found.indices[tuple(first)])


def matmul(input: Array, other: Array) -> Array:
    """Multiply vectors, matrices or batches of them. Both operands must have one dtype, as in torch."""
    if input.dtype != other.dtype:
        raise TypeError(f"cannot multiply {input.dtype} by {other.dtype}; both must have one dtype")
    return jnp.matmul(input, other, precision="highest")


def outer(input: Array, vec2: Array) -> Array:
    left, right = align(input, vec2)
    if left.ndim != 1 or right.ndim != 1:
        raise ValueError("outer takes vectors")
    return left[:, None] * right[None, :]


def _of_ranks(left: int, right: int) -> Callable[[Array, Array], Array]:
    def apply(input: Array, other: Array) -> Array:
        if (input.ndim, other.ndim) != (left, right):
            raise ValueError(
                f"the operands have {input.ndim} and {other.ndim} dimensions; expected {left} and {right}"
            )
        return matmul(input, other)

    return apply


def _root(x: Array) -> Array:
    zero = x == 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, x)))


def _floating(input: Array) -> Array:
    if category(input.dtype) != 2:
        raise TypeError(f"the input is {input.dtype}; convert it to float first")
    return input


def _given(input: Array, dtype: Any) -> Array:
    return _floating(input if dtype is None else input.astype(dtype))


def _needed(dim: int | None) -> int:
    if dim is None:
        raise ValueError("dim is missing")
    return dim


REDUCTIONS: dict[str, Callable[..., Any]] = {
    "sum": total,
    "mean": mean,
    "prod": prod,
    "nansum": nansum,
    "nanmean": nanmean,
    "var": var,
    "std": std,
    "norm": norm,
    "logsumexp": logsumexp,
    "softmax": softmax,
    "log_softmax": log_softmax,
    "max": _extreme(jnp.max, jnp.argmax, "maximum"),
    "min": _extreme(jnp.min, jnp.argmin, "minimum"),
    "amax": _all_extreme(jnp.max),
    "amin": _all_extreme(jnp.min),
    "argmax": _where_extreme(jnp.argmax),
    "argmin": _where_extreme(jnp.argmin),
    "any": _truth(jnp.any),
    "all": _truth(jnp.all),
    "count_nonzero": count_nonzero,
    "cumsum": cumsum,
    "cumprod": cumprod,
    "logcumsumexp": logcumsumexp,
    "sort": sort,
    "argsort": argsort,
    "topk": topk,
    "matmul": matmul,
    "mm": _of_ranks(2, 2),
    "bmm": _of_ranks(3, 3),
    "mv": _of_ranks(2, 1),
    "dot": _of_ranks(1, 1),
    "outer": outer,
}
