"""One AdamW step on a pytree of float32 weights, and the parts that every optimizer here shares.

A step builds optax's transforms from its hyper-parameters, which are traced scalars, so a new learning rate
compiles nothing. `optax.inject_hyperparams` is not used: it would keep the hyper-parameters in the state, and
so in every checkpoint. AdamW's state is `optax.ScaleByAdamState` alone (count, mu, nu).
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

AdamState: TypeAlias = optax.ScaleByAdamState


class AdamHyperparameters(NamedTuple):
    """AdamW's hyper-parameters, float32. `grad_scale` multiplies the gradients first; a
    `grad_clip_norm` of 0 is off."""

    learning_rate: Float[Array, ""]
    beta1: Float[Array, ""]
    beta2: Float[Array, ""]
    eps: Float[Array, ""]
    weight_decay: Float[Array, ""]
    grad_clip_norm: Float[Array, ""]
    grad_scale: Float[Array, ""]


class StepNorms(NamedTuple):
    """Global norms of one step; `gradient` is before clipping, `weights` after the step."""

    gradient: Float[Array, ""]
    update: Float[Array, ""]
    weights: Float[Array, ""]


def transformed(transform: optax.GradientTransformation, updates: Any, weights: Any = None) -> Any:
    """Return updates after a transform that keeps no state."""
    return transform.update(updates, transform.init(weights), weights)[0]


def clip(gradients: Any, scale: Float[Array, ""], max_norm: Float[Array, ""]) -> tuple[Any, Float[Array, ""]]:
    """Return scale · gradients, clipped by their global norm, and that norm before clipping.

    A `max_norm` of 0 or less turns clipping off.
    """
    gradients = optax.tree.scale(scale, gradients)
    limit = jnp.where(max_norm > 0, max_norm, jnp.inf)
    return transformed(optax.clip_by_global_norm(limit), gradients), optax.tree.norm(gradients)


def adam_directions(
    gradients: Any,
    state: AdamState,
    beta1: Float[Array, ""],
    beta2: Float[Array, ""],
    eps: Float[Array, ""],
) -> tuple[Any, AdamState]:
    """Return Adam's m̂ / (√v̂ + eps) (arXiv:1412.6980) and its new state, by `optax.scale_by_adam`.

    With an eps of 0, optax gives 0 / 0 for an element that has had no gradient yet; here that is 0.
    """
    quotients, state = optax.scale_by_adam(beta1, beta2, eps).update(gradients, state)
    return jax.tree.map(lambda q, m: jnp.where(m == 0, 0.0, q), quotients, state.mu), state


def descend(
    directions: Any, weights: Any, learning_rate: Float[Array, ""], weight_decay: Float[Array, ""]
) -> Any:
    """Return the updates -lr · (direction + decay · w): weight decay is decoupled (arXiv:1711.05101)."""
    decayed = optax.add_decayed_weights(weight_decay)
    return transformed(optax.chain(decayed, optax.scale_by_learning_rate(learning_rate)), directions, weights)


def add_if_finite(
    weights: Any, updates: Any, state: Any, new_state: Any, norm: Float[Array, ""]
) -> tuple[Any, Any, StepNorms]:
    """Return weights plus updates, the new state, and the norms.

    If `norm` (the gradient's) or the update's norm is not finite, weights and state stay as they were.
    `optax.apply_if_finite` differs: it looks at the gradients alone, keeps counts in the state and, after a
    number of failures, lets the update through.
    """
    update_norm = optax.tree.norm(updates)
    finite = jnp.isfinite(norm) & jnp.isfinite(update_norm)
    new_weights = optax.tree.where(finite, optax.apply_updates(weights, updates), weights)
    new_state = optax.tree.where(finite, new_state, state)
    return new_weights, new_state, StepNorms(norm, update_norm, optax.tree.norm(new_weights))


def step(
    weights: Any, state: AdamState, gradients: Any, hyper: AdamHyperparameters
) -> tuple[Any, AdamState, Any, StepNorms]:
    """Return new weights, new state, zeros in the gradients' buffers, and the norms.

    Clipping by global norm, then Adam with decoupled decay: w <- w - lr · (m̂ / (√v̂ + eps) + decay · w). A
    step that is not finite changes nothing (`add_if_finite`).
    """
    clipped, norm = clip(gradients, hyper.grad_scale, hyper.grad_clip_norm)
    directions, new_state = adam_directions(clipped, state, hyper.beta1, hyper.beta2, hyper.eps)
    updates = descend(directions, weights, hyper.learning_rate, hyper.weight_decay)
    new_weights, new_state, norms = add_if_finite(weights, updates, state, new_state, norm)
    return new_weights, new_state, optax.tree.zeros_like(gradients), norms
