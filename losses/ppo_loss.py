"""What tinkercloud's clients call `ppo_loss`: the clipped policy gradient with its servers' epsilons."""

from __future__ import annotations

import dataclasses

from . import policy_loss

# tinkercloud runs every policy loss with these; Source: its page, and SLIME_EPS_CLIP(_HIGH) in its code.
LOSS = dataclasses.replace(
    policy_loss.LOSS,
    name="ppo_loss",
    config={**policy_loss.LOSS.config, "eps_clip_high": 0.28},
)
