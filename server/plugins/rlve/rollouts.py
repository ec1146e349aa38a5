"""The problems of a step, and what its samples become: advantages, and datums to train on. All of it is a
function of the run's seed and what was sampled."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ....engine import messages
from ...wire.rlve import RlveConfig
from .difficulty import Difficulty
from .environments import Problem

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
