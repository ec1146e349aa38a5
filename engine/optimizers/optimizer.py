"""One AdamW step on a pytree of float32 weights.

Hyper-parameters are traced scalars, so a new learning rate compiles nothing, and the state holds none of
them: it is `optax.ScaleByAdamState` alone (count, mu, nu).
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

AdamState: TypeAlias = optax.ScaleByAdamState


class AdamHyperparameters(NamedTuple):
    """Float32 scalars. `grad_scale` multiplies the gradients first; `grad_clip_norm` 0 is off."""

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


def clip(gradients: Any, scale: Float[Array, ""], max_norm: Float[Array, ""]) -> tuple[Any, Float[Array, ""]]:
    """scale x gradients, clipped by their global norm (`optax.clip_by_global_norm`; 0 or less is off), and
    that norm before clipping."""
    gradients = jax.tree.map(lambda g: g * scale, gradients)
    norm = optax.tree.norm(gradients)
    limit = jnp.where(max_norm > 0, max_norm, jnp.inf)
    shrink = jnp.where(norm > limit, limit / norm, 1.0)
    return jax.tree.map(lambda g: g * shrink, gradients), norm


def add(
    weights: Any, updates: Any, state: Any, new_state: Any, norm: Float[Array, ""]
) -> tuple[Any, Any, StepNorms]:
    """Weights plus updates, the new state, and the norms; or, where `norm` (the gradient's) or the update's
    is not finite, weights and state as they were."""
    update_norm = optax.tree.norm(updates)
    finite = jnp.isfinite(norm) & jnp.isfinite(update_norm)
    new_weights = jax.tree.map(lambda w, u: jnp.where(finite, w + u, w), weights, updates)
    new_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new_state, state)
    return new_weights, new_state, StepNorms(norm, update_norm, optax.tree.norm(new_weights))


def step(
    weights: Any, state: AdamState, gradients: Any, hyper: AdamHyperparameters
) -> tuple[Any, AdamState, Any, StepNorms]:
    """New weights, new state, zeros in the gradients' buffers, and the norms.

    Clipping by global norm, then Adam (arXiv:1412.6980) with decoupled weight decay (arXiv:1711.05101):
    w - lr · (m̂ / (√v̂ + eps) + decay · w). A step that is not finite changes nothing (`add`).
    """
    clipped, norm = clip(gradients, hyper.grad_scale, hyper.grad_clip_norm)
    adam = optax.scale_by_adam(hyper.beta1, hyper.beta2, hyper.eps)
    quotients, new_state = adam.update(clipped, state)
    # Without an eps, what has had no gradient yet is 0 / 0.
    directions = jax.tree.map(lambda q, m: jnp.where(m == 0, 0.0, q), quotients, new_state.mu)
    updates = jax.tree.map(
        lambda u, w: -hyper.learning_rate * (u + hyper.weight_decay * w), directions, weights
    )
    new_weights, new_state, norms = add(weights, updates, state, new_state, norm)
    return new_weights, new_state, jax.tree.map(jnp.zeros_like, gradients), norms
