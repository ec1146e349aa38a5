"""Metrics of how evenly a mixture's routers spread an operation's tokens over the experts.

The names, their meanings and the reductions behind the colon are those of the Tinker SDK's
`ForwardBackwardOutput.metrics`.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int


def router_metrics(tokens_LE: Int[np.ndarray, "L E"]) -> dict[str, float]:
    """Return the metrics, from the numbers of tokens that each expert of each layer got."""
    fair_L1 = tokens_LE.mean(axis=1, keepdims=True)
    if not fair_L1.all():
        return {}
    violation_LE = (tokens_LE - fair_L1) / fair_L1
    most_L = violation_LE.max(axis=1)
    return {
        "e_frac_with_tokens:mean": float((tokens_LE > 0).mean()),
        "e_frac_oversubscribed:mean": float((violation_LE > 0).mean()),
        "e_max_violation:mean": float(most_L.mean()),
        "e_max_violation:max": float(most_L.max()),
        "e_min_violation:mean": float(violation_LE.min(axis=1).mean()),
    }
