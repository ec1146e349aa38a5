"""Loss functions on per-token log-probs, by their wire names.

The order of `FUNCTIONS` is the index by which a compiled program chooses the loss of a row: several names may
stand for one function.
"""

from . import (
    causallm_loss,
    cispo,
    cross_entropy,
    drgrpo,
    dro,
    gspo,
    importance_sampling,
    policy_loss,
    ppo,
    ppo_loss,
    stable_reinforce,
)
from .loss import MAX_CONFIG, Loss, loss_and_slope

REGISTRY: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        cross_entropy.LOSS,
        importance_sampling.LOSS,
        ppo.LOSS,
        cispo.LOSS,
        dro.LOSS,
        stable_reinforce.LOSS,
        gspo.LOSS,
        causallm_loss.LOSS,
        policy_loss.LOSS,
        ppo_loss.LOSS,
        drgrpo.LOSS,
    )
}

FUNCTIONS: tuple[Loss, ...] = tuple(
    {loss.function: loss for loss in (*REGISTRY.values(), drgrpo.SEQUENCE)}.values()
)

__all__ = ["FUNCTIONS", "MAX_CONFIG", "REGISTRY", "Loss", "loss_and_slope"]
