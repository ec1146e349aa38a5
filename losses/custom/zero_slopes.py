"""Elementwise functions with zero gradients for their arguments wherever the result's gradient is zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .dtypes import category, is_array


def with_zero_slopes(function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Call an elementwise function, and mask its gradients where its result does not count.

    Where the gradient of the result is 0, the gradients of the arguments are 0 too, even if the function's
    own slope is infinite or NaN. So `torch.where(mask, loss, 0)` masks the gradient as it masks the value. By
    the chain rule alone, a masked token whose exponential overflows would give 0 · inf, which is NaN (as in
    torch).
    """
    result = function(*args, **kwargs)
    if not is_array(result) or category(result.dtype) != 2:
        return result
    leaves, structure = jax.tree.flatten((args, kwargs), is_leaf=lambda leaf: leaf is None)
    places = [at for at, leaf in enumerate(leaves) if is_array(leaf)]
    if not places:
        return result

    def of_arrays(*arrays: Any) -> Any:
        whole = list(leaves)
        for at, array in zip(places, arrays, strict=True):
            whole[at] = array
        args, kwargs = jax.tree.unflatten(structure, whole)
        return function(*args, **kwargs)

    def backward(pull: Any, gradient: Any) -> tuple[Any, ...]:
        return tuple(
            jnp.where(gradient == 0, jnp.zeros_like(slope), slope)
            if slope.shape == gradient.shape and jnp.issubdtype(slope.dtype, jnp.floating)
            else slope
            for slope in pull(gradient)
        )

    called = jax.custom_vjp(of_arrays)
    called.defvjp(lambda *arrays: jax.vjp(of_arrays, *arrays), backward)
    return called(*[leaves[at] for at in places])
