"""What is told of a step."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .difficulty import Difficulty
from .rollouts import Group


def of_step(
    step: int, groups: Sequence[Group], trained: int, difficulties: Mapping[str, Difficulty]
) -> dict[str, Any]:
    """Of all that was sampled for it; `trained` of the groups were trained on. `difficulties` after it."""
    lengths = [len(sequence.tokens) // 4 for group in groups for sequence in group.sequences]
    environments = {}
    for name, difficulty in difficulties.items():
        own = [group for group in groups if group.draw.problem.environment == name]
        environments[name] = {"difficulty": difficulty.top, "prompts": len(own), **_means(own)}
    return {
        "step": step,
        "prompts": len(groups),
        "trained_prompts": trained,
        "response_tokens": statistics.fmean(lengths),
        **_means(groups),
        "environments": environments,
    }


def _means(groups: Sequence[Group]) -> dict[str, float]:
    """Of samples; nothing of none."""
    if not groups:
        return {}
    return {
        "reward_mean": statistics.fmean(score for group in groups for score in group.scores),
        "accuracy": statistics.fmean(right for group in groups for right in group.right),
    }


def flat(metrics: Mapping[str, Any]) -> dict[str, float]:
    """For a logger of numbers: `rlve/reward_mean`, `rlve/<environment>/accuracy`."""
    numbers = {f"rlve/{name}": value for name, value in metrics.items() if isinstance(value, int | float)}
    for environment, own in metrics["environments"].items():
        numbers |= {f"rlve/{environment}/{name}": value for name, value in own.items()}
    return numbers
