"""torch's cumulative reductions in JAX. Parameters have torch's names.

JAX differentiates a product or a log-sum by a program that takes seconds to compile, once for each length. So
these two have their gradients here, as torch computes them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from .dtypes import category, summed


def cumsum(input: Shaped[Array, "*N"], dim: int, *, dtype: Any = None) -> Shaped[Array, "*N"]:
    return jnp.cumsum(summed(input, dtype), axis=dim)


def cumprod(input: Shaped[Array, "*N"], dim: int, *, dtype: Any = None) -> Shaped[Array, "*N"]:
    x = summed(input, dtype)
    return _product(x, dim % x.ndim) if category(x.dtype) == 2 else jnp.cumprod(x, axis=dim)


def logcumsumexp(input: Float[Array, "*N"], dim: int) -> Float[Array, "*N"]:
    return _log_sum(input, dim % input.ndim)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _product(x: Float[Array, "*N"], axis: int) -> Float[Array, "*N"]:
    return lax.cumprod(x, axis)


def _product_backward(axis: int, kept: tuple[Array, Array], gradient: Array) -> tuple[Array]:
    """dx_i = Σ_{j ≥ i} g_j y_j / x_i, up to the first zero of x; there, the product leaves the zero out; and
    0 after it, where every product has that zero as a factor."""
    x, y = kept
    zeros = lax.cumsum((x == 0).astype(jnp.int32), axis)  # so far
    first_zero = (x == 0) & (zeros == 1)
    without = lax.cumprod(jnp.where(first_zero, 1, x), axis)
    before = lax.cumsum(gradient * y, axis, reverse=True) / jnp.where(x == 0, 1, x)
    at = lax.cumsum(gradient * without, axis, reverse=True)
    return (jnp.where(first_zero, at, jnp.where(zeros == 0, before, 0)),)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _log_sum(x: Float[Array, "*N"], axis: int) -> Float[Array, "*N"]:
    return lax.cumlogsumexp(x, axis)


def _log_sum_backward(axis: int, kept: tuple[Array, Array], gradient: Array) -> tuple[Array]:
    """dx_i = Σ_{j ≥ i} g_j exp(x_i - y_j). The sums over positive and over negative g_j are computed as
    exp(x_i + log Σ)."""
    x, y = kept
    empty = y == -jnp.inf  # the sum of no number, with no gradient

    def of(part: Array) -> Array:
        some = (part > 0) & ~empty
        logs = jnp.where(some, jnp.log(jnp.where(some, part, 1)) - jnp.where(empty, 0, y), -jnp.inf)
        return jnp.exp(x + lax.cumlogsumexp(logs, axis, reverse=True))

    return (of(gradient) - of(-gradient),)


def _with_result(function: Any) -> Any:
    def forward(x: Array, axis: int) -> tuple[Array, tuple[Array, Array]]:
        y = function(x, axis)
        return y, (x, y)

    return forward


_product.defvjp(_with_result(_product), _product_backward)
_log_sum.defvjp(_with_result(_log_sum), _log_sum_backward)
