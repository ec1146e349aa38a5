"""Loss functions on per-token log-probs, by the names that clients use.

A compiled program selects the loss of each row by its index in `FUNCTIONS`. Several names may share one
function.
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
