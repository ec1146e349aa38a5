"""Steps without second moments on a pytree of float32 weights: SGD with momentum, and signs.

Hyper-parameters are traced scalars, as in `optimizer`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import optax
from jaxtyping import Array, Float, Int

from .optimizer import StepNorms, add_if_finite, clip, descend, transformed


class SgdState(NamedTuple):
    """The number of steps, and the momentum: a tree like the weights."""

    count: Int[Array, ""]
    momentum: Any


class SignState(NamedTuple):
    """The number of steps."""

    count: Int[Array, ""]


class SgdHyperparameters(NamedTuple):
    """Hyper-parameters, float32. `nesterov` is 0 or 1; `sign_step` uses neither it nor `momentum`."""

    learning_rate: Float[Array, ""]
    weight_decay: Float[Array, ""]
    grad_clip_norm: Float[Array, ""]
    grad_scale: Float[Array, ""]
    momentum: Float[Array, ""]
    nesterov: Float[Array, ""]


def new_state(count: Any, new: Callable[[], Any]) -> SgdState:
    """Return a state whose momentum is `new()`: a tree like the weights, of zeros or of anything else."""
    return SgdState(count, new())


def new_sign_state(count: Any, new: Callable[[], Any]) -> SignState:
    return SignState(count)


def step(
    weights: Any, state: SgdState, gradients: Any, hyper: SgdHyperparameters
) -> tuple[Any, SgdState, Any, StepNorms]:
    """Return new weights, new state, zeros in the gradients' buffers, and the norms.

    g <- clip(g) + decay · w;  m <- momentum · m + g;  w <- w - lr · (m, or with Nesterov g + momentum · m).
    The decay is part of the gradient, as in `torch.optim.SGD`, whose formula this is (no dampening). A step
    that is not finite changes nothing (`add_if_finite`).
    """
    clipped, norm = clip(gradients, hyper.grad_scale, hyper.grad_clip_norm)
    decayed = transformed(optax.add_decayed_weights(hyper.weight_decay), clipped, weights)
    # `nesterov` is traced, and optax wants a bool: its transform computes both.
    trace = optax.trace(hyper.momentum, nesterov=True)
    ahead, (momentum,) = trace.update(decayed, optax.TraceState(state.momentum))
    directions = optax.tree.where(hyper.nesterov > 0, ahead, momentum)
    updates = transformed(optax.scale_by_learning_rate(hyper.learning_rate), directions)
    new = SgdState(optax.safe_increment(state.count), momentum)
    new_weights, new, norms = add_if_finite(weights, updates, state, new, norm)
    return new_weights, new, optax.tree.zeros_like(gradients), norms


def sign_step(
    weights: Any, state: SignState, gradients: Any, hyper: SgdHyperparameters
) -> tuple[Any, SignState, Any, StepNorms]:
    """Step as `step` does, by w <- w - lr · (sign(g) + decay · w).

    Source: Bernstein et al. 2018 (arXiv:1802.04434), alg. 1, with decoupled decay as in xorl's `signsgd`.
    """
    clipped, norm = clip(gradients, hyper.grad_scale, hyper.grad_clip_norm)
    signs = transformed(optax.scale_by_sign(), clipped)
    updates = descend(signs, weights, hyper.learning_rate, hyper.weight_decay)
    new = SignState(optax.safe_increment(state.count))
    new_weights, new, norms = add_if_finite(weights, updates, state, new, norm)
    return new_weights, new, optax.tree.zeros_like(gradients), norms
