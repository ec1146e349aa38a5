"""The problems of a step, and what its samples become: advantages, and datums to train on. All of it is a
function of the run's seed and what was sampled.

How hard an environment's problems are: a window of levels that moves up when its top is mastered.

Source: Zeng et al. 2025, "RLVE: Scaling Up Reinforcement Learning for Language Models with Adaptive
Verifiable Environments" (arXiv:2511.07317), section 2. Problems are drawn from the levels of a window that
ends at `top`. Samples at the top are counted; when there are enough of them, and so many are right, the top
is one higher. The count begins anew either way. What is special here: reasoning-gym's curricula have a
highest level, at which the top stays.

What is told of a step.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ....engine import messages
from ...wire.requests import RlveConfig
from .environments import Problem


@dataclass(frozen=True)
class Difficulty:
    """Of one environment. `samples` at the top since the last check, of which `right` were right;
    `accuracy` is that of the last check."""

    top: int
    highest: int
    samples: int = 0
    right: int = 0
    accuracy: float | None = None

    def window(self, size: int) -> range:
        return range(max(0, self.top - size + 1), self.top + 1)

    def counted(self, outcomes: Iterable[tuple[int, int, int]], enough: int, threshold: float) -> Difficulty:
        """After further problems, each a level, a number of samples, and how many of them were right."""
        at_top = [(samples, right) for level, samples, right in outcomes if level == self.top]
        samples = self.samples + sum(each for each, _ in at_top)
        right = self.right + sum(each for _, each in at_top)
        if samples < enough:
            return replace(self, samples=samples, right=right)
        accuracy = right / samples
        top = min(self.top + (accuracy >= threshold), max(self.top, self.highest))
        return Difficulty(top, self.highest, accuracy=accuracy)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


_STD_EPSILON = 1e-6  # as Miles adds it


@dataclass(frozen=True)
class Draw:
    """A problem, and the seed that its samples are drawn with."""

    problem: Problem
    sampling_seed: int


@dataclass(frozen=True)
class Group:
    """A problem's samples, their scores, and whether each is right."""

    draw: Draw
    prompt: list[int]
    sequences: list[messages.SampledSequence]
    scores: list[float]

    @property
    def right(self) -> list[bool]:
        return [score >= 1.0 for score in self.scores]

    def rewards(self, key: str) -> list[float]:
        return [float(right) for right in self.right] if key == "accuracy" else self.scores


def draws(config: RlveConfig, difficulties: Mapping[str, Difficulty], step: int, wave: int) -> Iterator[Draw]:
    """As many as are asked for: an environment, a level of its window and the seeds, all uniform."""
    rng = random.Random(f"{config.seed}/{step}/{wave}")
    while True:
        name = rng.choice(config.environment_list)
        level = rng.choice(difficulties[name].window(config.difficulty_sliding_window_size))
        yield Draw(Problem(name, level, rng.randrange(1 << 31)), rng.randrange(1 << 62))


def differ(rewards: Sequence[float]) -> bool:
    """Whether there is anything to learn from the group."""
    return statistics.pstdev(rewards) > _STD_EPSILON


def advantages(rewards: Sequence[float]) -> list[float]:
    """(r - mean) / (std + 1e-6) over the samples of a prompt, std with n - 1.

    Source: Shao et al. 2024, "DeepSeekMath" (arXiv:2402.03300), section 4.1.2; what is added is Miles's.
    """
    mean, std = statistics.fmean(rewards), statistics.stdev(rewards)
    return [(reward - mean) / (std + _STD_EPSILON) for reward in rewards]


def datums(group: Group, reward_key: str) -> list[messages.Datum]:
    """Position i predicts token i + 1; what predicts the prompt has log-prob and advantage 0."""
    each = zip(group.sequences, advantages(group.rewards(reward_key)), strict=True)
    return [_datum(group.prompt, sequence, advantage) for sequence, advantage in each]


def _datum(prompt: list[int], sequence: messages.SampledSequence, advantage: float) -> messages.Datum:
    tokens = np.append(np.asarray(prompt, "<i4"), np.frombuffer(sequence.tokens, "<i4"))
    before = np.zeros(len(prompt) - 1, "<f4")
    logprobs = np.append(before, np.frombuffer(sequence.logprobs, "<f4"))
    weighed = np.append(before, np.full(len(tokens) - len(prompt), advantage, "<f4"))
    shape = (len(tokens) - 1,)
    return messages.Datum(
        tokens[:-1].astype("<i4").tobytes(),
        {
            "target_tokens": messages.Tensor("int64", shape, tokens[1:].astype("<i8").tobytes()),
            "logprobs": messages.Tensor("float32", shape, logprobs.astype("<f4").tobytes()),
            "advantages": messages.Tensor("float32", shape, weighed.astype("<f4").tobytes()),
        },
    )


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
