"""One dimuon step on a pytree of float32 weights: Muon for matrices, AdamW for everything else.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) moves a matrix along its momentum with
all singular values brought near 1, by five Newton-Schulz iterations with the published coefficients:

    m <- beta1 m + (1 - beta1) g;    u = beta1 m + (1 - beta1) g (Nesterov);    w <- w - lr c NS(u)

What the SDK says of "dimuon" is its fields: `learning_rate`, `beta1` (the momentum's moving average, 0.9)
and `grad_clip_norm`; neither it nor the wire defines the update or the "di". What follows is therefore ours:

- The two factors A and B of an adapter are matrices of their own, each orthogonalised by itself; that is how
  we read the "di". Rows and columns that a rank bucket pads are zeros and stay zeros, and c knows the true
  rank, so the padding changes nothing.
- With full weights, matrices are those of the layers' linears; embeddings, head, norms and biases take AdamW
  with the same learning rate and beta1, beta2 0.95 and eps 1e-12 (the SDK's defaults) and no decay.
- c = 0.2 sqrt(max(rows, columns)) (arXiv:2502.16982): an update then has the root mean square of one of
  AdamW's, so that one learning rate does for both, and those found with AdamW carry over.
- Nesterov's momentum, as published and as in `torch.optim.Muon`; there is no weight decay.
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
BETA2, EPS = 0.95, 1e-12  # of AdamW, for what is not a matrix


class DimuonState(NamedTuple):
    """`momentum` is like the weights; `squares` has the second moments of what takes AdamW, by its path."""

    count: Int[Array, ""]
    momentum: Any
    squares: dict[str, Array]


class DimuonHyperparameters(NamedTuple):
    """Float32 scalars. `rank`: the true one of an adapter, whose arrays may be padded."""

    learning_rate: Float[Array, ""]
    beta1: Float[Array, ""]
    grad_clip_norm: Float[Array, ""]
    grad_scale: Float[Array, ""]
    rank: Float[Array, ""]


def new_state(count: Any, new: Callable[[], Any]) -> DimuonState:
    """`new()` is a tree like the weights, of zeros or of anything else, with arrays of its own each time."""
    leaves = jax.tree_util.tree_leaves_with_path(new())
    return DimuonState(count, new(), {_name(path): leaf for path, leaf in leaves if not _matrix(path, leaf)})


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
    weights: Any, state: DimuonState, gradients: Any, hyper: DimuonHyperparameters
) -> tuple[Any, DimuonState, Any, StepNorms]:
    """New weights, new state, zeros in the gradients' buffers, and the norms.

    Clipping by global norm comes first. A step that is not finite changes nothing (`optimizer.add`).
    """
    clipped, norm = clip(gradients, hyper.grad_scale, hyper.grad_clip_norm)
    beta1 = hyper.beta1
    count = state.count + 1
    momentum = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, state.momentum, clipped)
    squares: dict[str, Array] = {}

    def update(path: Any, m: Array, g: Array) -> Array:
        if _matrix(path, g):
            direction = orthogonalise(beta1 * m + (1 - beta1) * g)
            return -hyper.learning_rate * RMS * jnp.sqrt(_longer_side(path, g, hyper.rank)) * direction
        name = _name(path)
        squares[name] = v = BETA2 * state.squares[name] + (1 - BETA2) * g * g
        m_hat, v_hat = m / (1 - beta1**count), v / (1 - BETA2**count)
        return -hyper.learning_rate * m_hat / (jnp.sqrt(v_hat) + EPS)

    updates = jax.tree_util.tree_map_with_path(update, momentum, clipped)
    new = DimuonState(count, momentum, squares)
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


def _longer_side(path: Any, leaf: Array, rank: Float[Array, ""]) -> Float[Array, ""]:
    """Of the matrix without its padding."""
    rows, columns = leaf.shape[-2:]
    if _is_factor(path):
        return jnp.maximum(rows if _keys(path)[-1] == "a" else columns, rank)
    return jnp.float32(max(rows, columns))
