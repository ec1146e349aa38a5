"""xorl's `causallm_loss`: cross-entropy with optional weights."""

from __future__ import annotations

import dataclasses

from . import cross_entropy

# Without weights, every target other than -100 counts. The answer always has the log-prob of each token.
LOSS = dataclasses.replace(
    cross_entropy.LOSS, name="causallm_loss", defaults={"weights": 1.0}, reports=("return_per_token",)
)
