"""Elementwise functions of torch that take a short formula, in JAX, with torch's values and gradients.

Parameters have torch's names."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from .dtypes import Operand, align, as_float, category


def softplus(input: Operand, beta: float = 1.0, threshold: float = 20.0) -> Array:
    """log(1 + exp(beta x)) / beta, or x itself where beta x is above the threshold."""
    x = as_float(input)
    scaled = x * beta
    linear = scaled > threshold
    return jnp.where(linear, x, jnp.log1p(jnp.exp(jnp.where(linear, 0.0, scaled))) / beta)


def xlogy(input: Operand, other: Operand) -> Array:
    """x log y, or 0 where x is 0."""
    x, y = (as_float(each) for each in align(input, other))
    return x * jnp.log(jnp.where((x == 0) & (y <= 0), 1.0, y))


def nan_to_num(
    input: Array, nan: float = 0.0, posinf: float | None = None, neginf: float | None = None
) -> Array:
    return jnp.nan_to_num(input, nan=nan, posinf=posinf, neginf=neginf)


def lerp(input: Operand, end: Operand, weight: Operand) -> Array:
    """input + weight (end - input)."""
    start, stop = align(input, end)
    return start + jnp.asarray(weight, start.dtype) * (stop - start)


def relu(input: Shaped[Array, "*N"]) -> Shaped[Array, "*N"]:
    """max(x, 0), with gradient 0 at 0."""
    return jnp.where(input > 0, input, jnp.zeros((), input.dtype))


def leaky_relu(input: Float[Array, "*N"], negative_slope: float = 0.01) -> Array:
    return jnp.where(input > 0, input, input * negative_slope)


def elu(input: Float[Array, "*N"], alpha: float = 1.0) -> Array:
    return jnp.where(input > 0, input, alpha * jnp.expm1(jnp.where(input > 0, 0.0, input)))


def magnitude(x: Shaped[Array, "*N"]) -> Shaped[Array, "*N"]:
    """|x|, with gradient 0 at 0."""
    return x * jax.lax.stop_gradient(jnp.sign(x)) if category(x.dtype) == 2 else jnp.abs(x)
