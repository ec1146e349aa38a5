"""Loss functions on per-token log-probs, by their wire names.

The order of `REGISTRY` is the index by which a compiled program chooses the loss of a row.
"""

from . import cispo, cross_entropy, dro, gspo, importance_sampling, ppo, stable_reinforce
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
    )
}

__all__ = ["MAX_CONFIG", "REGISTRY", "Loss", "loss_and_slope"]
