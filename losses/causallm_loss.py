"""What xorl calls `causallm_loss`: cross-entropy whose weights may be left out."""

from __future__ import annotations

import dataclasses

from . import cross_entropy

# Every target then counts but those of -100. Log-probs are always given of each token.
LOSS = dataclasses.replace(
    cross_entropy.LOSS, name="causallm_loss", defaults={"weights": 1.0}, reports=("return_per_token",)
)
