"""Steps without second moments on a pytree of float32 weights: SGD with momentum, and signs.

Hyper-parameters are traced scalars, as in `optimizer`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .optimizer import StepNorms, add, clip


class SgdState(NamedTuple):
    """`momentum` is like the weights."""

    count: Int[Array, ""]
    momentum: Any


class SignState(NamedTuple):
    """There is nothing to keep but the number of steps."""

    count: Int[Array, ""]


class SgdHyperparameters(NamedTuple):
    """Float32 scalars. `nesterov` is 0 or 1; the sign's step takes neither it nor `momentum`."""

    learning_rate: Float[Array, ""]
    weight_decay: Float[Array, ""]
    grad_clip_norm: Float[Array, ""]
    grad_scale: Float[Array, ""]
    momentum: Float[Array, ""]
    nesterov: Float[Array, ""]


def new_state(count: Any, new: Callable[[], Any]) -> SgdState:
    """`new()` is a tree like the weights, of zeros or of anything else."""
    return SgdState(count, new())


def new_sign_state(count: Any, new: Callable[[], Any]) -> SignState:
    return SignState(count)


def step(
    weights: Any, state: SgdState, gradients: Any, hyper: SgdHyperparameters
) -> tuple[Any, SgdState, Any, StepNorms]:
    """New weights, new state, zeros in the gradients' buffers, and the norms.

    g <- clip(g) + decay · w;  m <- momentum · m + g;  w <- w - lr · (m, or with Nesterov g + momentum · m).
    The decay is part of the gradient, as in `torch.optim.SGD`, whose formula this is (no dampening). A step
    that is not finite changes nothing (`add`).
    """
    clipped, norm = clip(gradients, hyper.grad_scale, hyper.grad_clip_norm)
    decayed = jax.tree.map(lambda g, w: g + hyper.weight_decay * w, clipped, weights)
    momentum = jax.tree.map(lambda m, g: hyper.momentum * m + g, state.momentum, decayed)
    ahead = hyper.nesterov * hyper.momentum
    updates = jax.tree.map(
        lambda m, g: -hyper.learning_rate * jnp.where(hyper.nesterov > 0, g + ahead * m, m), momentum, decayed
    )
    new = SgdState(state.count + 1, momentum)
    new_weights, new, norms = add(weights, updates, state, new, norm)
    return new_weights, new, jax.tree.map(jnp.zeros_like, gradients), norms


def sign_step(
    weights: Any, state: SignState, gradients: Any, hyper: SgdHyperparameters
) -> tuple[Any, SignState, Any, StepNorms]:
    """As `step`, by w <- w - lr · (sign(g) + decay · w).

    Source: Bernstein et al. 2018 (arXiv:1802.04434), alg. 1, with decoupled decay as in xorl's `signsgd`.
    """
    clipped, norm = clip(gradients, hyper.grad_scale, hyper.grad_clip_norm)
    updates = jax.tree.map(
        lambda g, w: -hyper.learning_rate * (jnp.sign(g) + hyper.weight_decay * w), clipped, weights
    )
    new_weights, new, norms = add(weights, updates, state, SignState(state.count + 1), norm)
    return new_weights, new, jax.tree.map(jnp.zeros_like, gradients), norms
