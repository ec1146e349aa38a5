"""tinkercloud's `ppo_loss`: the clipped policy gradient with the epsilons of its servers."""

from __future__ import annotations

import dataclasses

from . import policy_loss

# tinkercloud uses these for every policy loss. Source: its documentation, and SLIME_EPS_CLIP(_HIGH) in its
# code.
LOSS = dataclasses.replace(
    policy_loss.LOSS,
    name="ppo_loss",
    config={**policy_loss.LOSS.config, "eps_clip_high": 0.28},
)
