"""One dimuon step: Muon (`muon`) with the fields that the SDK gives it.

What the SDK says of "dimuon" is its fields: `learning_rate`, `beta1` (the momentum's moving average, 0.9)
and `grad_clip_norm`; neither it nor the wire defines the update or the "di". What follows is therefore ours:

- The two factors of an adapter are orthogonalised each by itself; that is how we read the "di".
- What is no matrix takes AdamW with the same learning rate and beta1, beta2 0.95 and eps 1e-12 (the SDK's
  defaults); nothing decays.
- An update has the root mean square of one of AdamW's, so that one learning rate does for both, and those
  found with AdamW carry over.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from . import muon
from .muon import MuonState as DimuonState
from .muon import new_state
from .optimizer import StepNorms

BETA2, EPS = 0.95, 1e-12  # of AdamW, for what is not a matrix


class DimuonHyperparameters(NamedTuple):
    """Float32 scalars. `rank`: the true one of an adapter, whose arrays may be padded."""

    learning_rate: Float[Array, ""]
    beta1: Float[Array, ""]
    grad_clip_norm: Float[Array, ""]
    grad_scale: Float[Array, ""]
    rank: Float[Array, ""]


def step(
    weights: Any, state: DimuonState, gradients: Any, hyper: DimuonHyperparameters
) -> tuple[Any, DimuonState, Any, StepNorms]:
    """As `muon.step`."""
    one, zero = jnp.float32(1), jnp.float32(0)
    own = hyper._asdict()
    whole = muon.MuonHyperparameters(
        **own,
        beta2=jnp.float32(BETA2),
        eps=jnp.float32(EPS),
        weight_decay=zero,
        matrix_learning_rate=hyper.learning_rate,
        momentum=hyper.beta1,
        nesterov=one,
        match_rms=one,
    )
    return muon.step(weights, state, gradients, whole)


__all__ = ["DimuonHyperparameters", "DimuonState", "new_state", "step"]
