"""One step of Muon for matrices, AdamW for everything else, on a pytree of float32 weights.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) moves a matrix along its momentum with
all singular values brought near 1, by five Newton-Schulz iterations with the published coefficients:

    m <- μ m + (1 - μ) g;    u = μ m + (1 - μ) g (Nesterov's; else m);    w <- w - lr (c NS(u) + decay w)

- c is sqrt(max(1, outputs / inputs)) of the matrix ("original"), or 0.2 sqrt(max(rows, columns)), with which
  an update has the root mean square of one of AdamW's (arXiv:2502.16982, "match_rms_adamw"). The formulas and
  the decay are those of `torch.optim.Muon`.
- The two factors A and B of an adapter are separate matrices, each orthogonalised by itself. Rows and columns
  that a rank bucket pads are zeros and stay zeros, and c is computed from the true rank, so the padding
  changes nothing.
- With full weights, matrices are the weights of the layers' linears; embeddings, head, norms and biases take
  AdamW.
- The iterations are in float32, where the published code rounds to bfloat16.

`optax.contrib.muon` has another formula: it corrects the two terms of Nesterov's sum for bias, each by a
different factor; it adds eps to the norm, which is bounded from below here; and it takes c from the padded
shape. AdamW is optax's (`optimizer`).

Letters: M rows, N columns of a matrix; leading axes are matrices of their own (layers).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from .optimizer import AdamState, StepNorms, adam_directions, add_if_finite, clip, descend

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
SMALLEST_NORM = 1e-7  # a momentum below this norm is not brought to norm 1
RMS = 0.2  # the root mean square of a typical update of AdamW


class MuonState(NamedTuple):
    """Muon's state. `momentum`: a tree like the weights; `squares`: AdamW's second moments, by path."""

    count: Int[Array, ""]
    momentum: Any
    squares: dict[str, Array]


class MuonHyperparameters(NamedTuple):
    """Muon's hyper-parameters, float32 scalars.

    `matrix_learning_rate` is Muon's; `learning_rate`, `beta1`, `beta2` and `eps` are AdamW's. `nesterov` and
    `match_rms` are 0 or 1. `rank` is an adapter's true rank; its arrays may be padded to a larger one.
    """

    learning_rate: Float[Array, ""]
    beta1: Float[Array, ""]
    beta2: Float[Array, ""]
    eps: Float[Array, ""]
    weight_decay: Float[Array, ""]
    grad_clip_norm: Float[Array, ""]
    grad_scale: Float[Array, ""]
    rank: Float[Array, ""]
    matrix_learning_rate: Float[Array, ""]
    momentum: Float[Array, ""]
    nesterov: Float[Array, ""]
    match_rms: Float[Array, ""]


def new_state(count: Any, new: Callable[[], Any]) -> MuonState:
    """Return a state made of calls of `new`.

    Each call returns a tree like the weights, of zeros or of anything else, with arrays of its own.
    """
    return MuonState(count, new(), _not_matrices(new()))


def orthogonalise(u: Float[Array, "*batch M N"]) -> Float[Array, "*batch M N"]:
    """Return U S' Vᵀ with S' around 1 (about 0.7 to 1.2), where U S Vᵀ is `u`; zeros stay zeros.

    x <- a x + (b G + c G²) x with G = x xᵀ, on the orientation whose G is the smaller.
    """
    a, b, c = COEFFICIENTS
    tall = u.shape[-2] > u.shape[-1]
    x = u.swapaxes(-1, -2) if tall else u
    norm = jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)
    x = x / jnp.maximum(norm, SMALLEST_NORM)
    product = partial(jnp.matmul, precision="highest")
    for _ in range(ITERATIONS):
        gram = product(x, x.swapaxes(-1, -2))
        x = a * x + product(b * gram + c * product(gram, gram), x)
    return x.swapaxes(-1, -2) if tall else x


def step(
    weights: Any, state: MuonState, gradients: Any, hyper: MuonHyperparameters
) -> tuple[Any, MuonState, Any, StepNorms]:
    """Return new weights, new state, zeros in the gradients' buffers, and the norms.

    Clipping by global norm comes first. A step that is not finite changes nothing (`add_if_finite`).
    """
    clipped, norm = clip(gradients, hyper.grad_scale, hyper.grad_clip_norm)
    adam = AdamState(state.count, _not_matrices(state.momentum), state.squares)
    directions, adam = adam_directions(_not_matrices(clipped), adam, hyper.beta1, hyper.beta2, hyper.eps)

    def average(path: Any, m: Array, g: Array) -> Array:
        if _matrix(path, g):
            return optax.tree.update_moment(g, m, hyper.momentum, 1)
        return adam.mu[_name(path)]

    momentum = jax.tree_util.tree_map_with_path(average, state.momentum, clipped)

    def update(path: Any, m: Array, g: Array, w: Array) -> Array:
        if not _matrix(path, g):
            return descend(directions[_name(path)], w, hyper.learning_rate, hyper.weight_decay)
        ahead = optax.tree.update_moment(g, m, hyper.momentum, 1)
        size = jnp.where(
            hyper.match_rms > 0,
            RMS * jnp.sqrt(_longer_side(path, g, hyper.rank)),
            jnp.sqrt(jnp.maximum(1, _outputs_per_input(path, g, hyper.rank))),
        )
        direction = size * orthogonalise(jnp.where(hyper.nesterov > 0, ahead, m))
        return descend(direction, w, hyper.matrix_learning_rate, hyper.weight_decay)

    updates = jax.tree_util.tree_map_with_path(update, momentum, clipped, weights)
    new = MuonState(adam.count, momentum, adam.nu)
    new_weights, new, norms = add_if_finite(weights, updates, state, new, norm)
    return new_weights, new, optax.tree.zeros_like(gradients), norms


def _keys(path: Any) -> list[str]:
    return [str(getattr(part, "key", getattr(part, "idx", part))) for part in path]


def _name(path: Any) -> str:
    return ".".join(_keys(path))


def _is_factor(path: Any) -> bool:
    return _keys(path)[-1] in ("a", "b")


def _matrix(path: Any, leaf: Any) -> bool:
    """Return whether a leaf is a matrix, or one per layer: a factor of an adapter, or a linear's weight."""
    return _is_factor(path) or (
        _keys(path)[0] == "layers" and _keys(path)[-1] == "weight" and len(leaf.shape) > 2
    )


def _not_matrices(tree: Any) -> dict[str, Any]:
    """Return the leaves that are not matrices, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_name(path): leaf for path, leaf in leaves if not _matrix(path, leaf)}


def _sides(path: Any, leaf: Array, rank: Float[Array, ""]) -> tuple[Array | int, Array | int]:
    """Return the inputs and outputs of the matrix without its padding."""
    rows, columns = leaf.shape[-2:]
    if _is_factor(path):
        return (rows, rank) if _keys(path)[-1] == "a" else (rank, columns)
    return rows, columns


def _longer_side(path: Any, leaf: Array, rank: Float[Array, ""]) -> Float[Array, ""]:
    inputs, outputs = _sides(path, leaf, rank)
    return jnp.maximum(jnp.float32(inputs), outputs)


def _outputs_per_input(path: Any, leaf: Array, rank: Float[Array, ""]) -> Float[Array, ""]:
    inputs, outputs = _sides(path, leaf, rank)
    return jnp.float32(outputs) / inputs
