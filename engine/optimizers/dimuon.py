"""One dimuon step: Muon (`muon`) with the hyper-parameters that the SDK gives it.

The SDK defines only the fields of "dimuon": `learning_rate`, `beta1` (of the momentum's moving average, 0.9)
and `grad_clip_norm`. Neither it nor the wire format defines the update, or says what "di" means. The rest is
our choice:

- The two factors of an adapter are orthogonalised separately; that is how we read the "di".
- Whatever is not a matrix takes AdamW with the same learning rate and beta1, beta2 0.95 and eps 1e-12 (the
  SDK's defaults); there is no weight decay.
- An update has the root mean square of one of AdamW's, so one learning rate serves both, and rates found with
  AdamW carry over.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from . import muon
from .muon import MuonState as DimuonState
from .muon import new_state
from .optimizer import StepNorms

BETA2, EPS = 0.95, 1e-12  # AdamW's, for whatever is not a matrix


class DimuonHyperparameters(NamedTuple):
    """Float32 scalars. `rank` is an adapter's true rank; its arrays may be padded to a larger one."""

    learning_rate: Float[Array, ""]
    beta1: Float[Array, ""]
    grad_clip_norm: Float[Array, ""]
    grad_scale: Float[Array, ""]
    rank: Float[Array, ""]


def step(
    weights: Any, state: DimuonState, gradients: Any, hyper: DimuonHyperparameters
) -> tuple[Any, DimuonState, Any, StepNorms]:
    """Take a step, as `muon.step`."""
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
