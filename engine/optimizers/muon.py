"""One step of Muon for matrices, AdamW for everything else, on a pytree of float32 weights.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) moves a matrix along its momentum with
all singular values brought near 1, by five Newton-Schulz iterations with the published coefficients:

    m <- μ m + (1 - μ) g;    u = μ m + (1 - μ) g (Nesterov's; else m);    w <- w - lr (c NS(u) + decay w)

- c is sqrt(max(1, outputs / inputs)) of the matrix ("original"), or 0.2 sqrt(max(rows, columns)), with which
  an update has the root mean square of one of AdamW's (arXiv:2502.16982, "match_rms_adamw"). Both as in
  `torch.optim.Muon`, whose decay this is too.
- The two factors A and B of an adapter are matrices of their own, each orthogonalised by itself. Rows and
  columns that a rank bucket pads are zeros and stay zeros, and c knows the true rank, so the padding changes
  nothing.
- With full weights, matrices are those of the layers' linears; embeddings, head, norms and biases take AdamW.
- The iterations are in float32, where the published code rounds to bfloat16.

Letters: M rows, N columns of a matrix; leading axes are matrices of their own (layers).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .optimizer import StepNorms, add, clip

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
SMALLEST_NORM = 1e-7  # of a momentum that is brought to norm 1
RMS = 0.2  # of an update, as AdamW's typically is


class MuonState(NamedTuple):
    """`momentum` is like the weights; `squares` has the second moments of what takes AdamW, by its path."""

    count: Int[Array, ""]
    momentum: Any
    squares: dict[str, Array]


class MuonHyperparameters(NamedTuple):
    """Float32 scalars. `matrix_learning_rate` is Muon's, `learning_rate` with `beta1`, `beta2` and `eps`
    AdamW's. `nesterov` and `match_rms` are 0 or 1. `rank`: the true one of an adapter, whose arrays may be
    padded."""

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
    """`new()` is a tree like the weights, of zeros or of anything else, with arrays of its own each time."""
    leaves = jax.tree_util.tree_leaves_with_path(new())
    return MuonState(count, new(), {_name(path): leaf for path, leaf in leaves if not _matrix(path, leaf)})


def orthogonalise(u: Float[Array, "*batch M N"]) -> Float[Array, "*batch M N"]:
    """U S' Vᵀ with S' around 1 (about 0.7 to 1.2), where U S Vᵀ is `u`; zeros stay zeros.

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
    """New weights, new state, zeros in the gradients' buffers, and the norms.

    Clipping by global norm comes first. A step that is not finite changes nothing (`optimizer.add`).
    """
    clipped, norm = clip(gradients, hyper.grad_scale, hyper.grad_clip_norm)
    count = state.count + 1
    squares: dict[str, Array] = {}

    def average(path: Any, m: Array, g: Array) -> Array:
        beta = hyper.momentum if _matrix(path, g) else hyper.beta1
        return beta * m + (1 - beta) * g

    momentum = jax.tree_util.tree_map_with_path(average, state.momentum, clipped)

    def update(path: Any, m: Array, g: Array, w: Array) -> Array:
        if _matrix(path, g):
            ahead = hyper.momentum * m + (1 - hyper.momentum) * g
            direction = orthogonalise(jnp.where(hyper.nesterov > 0, ahead, m))
            size = jnp.where(
                hyper.match_rms > 0,
                RMS * jnp.sqrt(_longer_side(path, g, hyper.rank)),
                jnp.sqrt(jnp.maximum(1, _outputs_per_input(path, g, hyper.rank))),
            )
            return -hyper.matrix_learning_rate * (size * direction + hyper.weight_decay * w)
        name = _name(path)
        squares[name] = v = hyper.beta2 * state.squares[name] + (1 - hyper.beta2) * g * g
        m_hat, v_hat = m / (1 - hyper.beta1**count), v / (1 - hyper.beta2**count)
        # Without an eps, what has had no gradient yet is 0 / 0.
        direction = jnp.where(m == 0, 0.0, m_hat / (jnp.sqrt(v_hat) + hyper.eps))
        return -hyper.learning_rate * (direction + hyper.weight_decay * w)

    updates = jax.tree_util.tree_map_with_path(update, momentum, clipped, weights)
    new = MuonState(count, momentum, squares)
    new_weights, new, norms = add(weights, updates, state, new, norm)
    return new_weights, new, jax.tree.map(jnp.zeros_like, gradients), norms


def _keys(path: Any) -> list[str]:
    return [str(getattr(part, "key", getattr(part, "idx", part))) for part in path]


def _name(path: Any) -> str:
    return ".".join(_keys(path))


def _is_factor(path: Any) -> bool:
    return _keys(path)[-1] in ("a", "b")


def _matrix(path: Any, leaf: Any) -> bool:
    """Whether a leaf is a matrix, or one per layer: a factor of an adapter, or a linear's weight."""
    return _is_factor(path) or (_keys(path)[0] == "layers" and len(leaf.shape) == 3)


def _sides(path: Any, leaf: Array, rank: Float[Array, ""]) -> tuple[Array | int, Array | int]:
    """Inputs and outputs of the matrix without its padding."""
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
