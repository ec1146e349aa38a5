"""Problems of a training step: their prompts and difficulty, and what the samples become (advantages,
datums, metrics).

Everything here is a function of the run's seed and of what was sampled.

The difficulty of an environment is a window of levels that ends at `top`. Problems are drawn from its
levels. Samples at the top are counted; when there are enough of them and the share of right answers
reaches a threshold, the top moves up by one. The count begins anew either way. reasoning-gym's curricula
have a highest level, at which the top stays.

Source: Zeng et al. 2025, "RLVE: Scaling Up Reinforcement Learning for Language Models with Adaptive
Verifiable Environments" (arXiv:2511.07317), section 2.
"""

from __future__ import annotations

import itertools
import random
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ....engine import messages
from ...errors import BadRequest
from ...text import ChatTokenizer, of_folder
from ...wire.requests import AnswerMarker, PromptPreprocessor, RlveConfig
from .environments import Environments, NotMadeError, Problem


@dataclass(frozen=True)
class Difficulty:
    """The difficulty of one environment.

    `samples` at the top since the last check, of which `right` were right; `accuracy` is that of the last
    check.
    """

    top: int
    highest: int
    samples: int = 0
    right: int = 0
    accuracy: float | None = None

    def window(self, size: int) -> range:
        return range(max(0, self.top - size + 1), self.top + 1)

    def counted(self, outcomes: Iterable[tuple[int, int, int]], enough: int, threshold: float) -> Difficulty:
        """Return the difficulty after more problems. `outcomes`: level, samples and right samples of each."""
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


_STD_EPSILON = 1e-6  # as in Miles


@dataclass(frozen=True)
class Draw:
    """A problem, and the seed of its samples."""

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
    """Draw problems without end: an environment, a level in its window, and the seeds, all uniform."""
    rng = random.Random(f"{config.seed}/{step}/{wave}")
    while True:
        name = rng.choice(config.environment_list)
        level = rng.choice(difficulties[name].window(config.difficulty_sliding_window_size))
        yield Draw(Problem(name, level, rng.randrange(1 << 31)), rng.randrange(1 << 62))


def differ(rewards: Sequence[float]) -> bool:
    """Return whether the rewards differ, so that there is something to learn from the group."""
    return statistics.pstdev(rewards) > _STD_EPSILON


def advantages(rewards: Sequence[float]) -> list[float]:
    """Return (r - mean) / (std + 1e-6) over the samples of a prompt, std with n - 1.

    Source: Shao et al. 2024, "DeepSeekMath" (arXiv:2402.03300), section 4.1.2; the 1e-6 is from Miles.
    """
    mean, std = statistics.fmean(rewards), statistics.stdev(rewards)
    return [(reward - mean) / (std + _STD_EPSILON) for reward in rewards]


def datums(group: Group, reward_key: str) -> list[messages.Datum]:
    """Make the datums of a group. Position i predicts token i + 1; the prompt's log-probs and advantages are
    0."""
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
    """Return a step's metrics: all its groups, how many were trained on, and the difficulties after it."""
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
    """Return the mean reward and accuracy of the samples; nothing without groups."""
    if not groups:
        return {}
    return {
        "reward_mean": statistics.fmean(score for group in groups for score in group.scores),
        "accuracy": statistics.fmean(right for group in groups for right in group.right),
    }


def flat(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Flatten the metrics for a logger of numbers: `rlve/reward_mean`, `rlve/<environment>/accuracy`."""
    numbers = {f"rlve/{name}": value for name, value in metrics.items() if isinstance(value, int | float)}
    for environment, own in metrics["environments"].items():
        numbers |= {f"rlve/{environment}/{name}": value for name, value in own.items()}
    return numbers


# --- prompts, and the answers in sampled text

_ASKED_AS = {
    "<answer></answer>": "in <answer> </answer> tags",
    "\\boxed{}": "in \\boxed{}",
    "none": "alone, without anything else",
}
# The prompt of DeepSeek-R1-Zero (arXiv:2501.12948, table 1) for base models, in the form of TinyZero.
_CONVERSATION = (
    "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. The "
    "Assistant first thinks about it in <think> </think> tags, and then gives the final answer {where}.\n"
    "User: {question}\nAssistant: Let me solve this step by step.\n<think>"
)
_TURN = "{question}\n\nGive the final answer {where}."


def prompt(
    question: str, preprocessor: PromptPreprocessor, marker: AnswerMarker, tokenizer: ChatTokenizer
) -> list[int]:
    """Return the tokens of a prompt. Raises BadRequest if the model lacks the chat template that it needs."""
    where = _ASKED_AS[marker]
    if preprocessor == "TinyZero":
        return tokenizer.encode(_CONVERSATION.format(question=question, where=where))
    content = question if marker == "none" else _TURN.format(question=question, where=where)
    return tokenizer.conversation([{"role": "user", "content": content}])


def answer(text: str, marker: AnswerMarker) -> str | None:
    """Return the last marked answer in a text; None if there is none."""
    if marker == "none":
        return text.strip()
    if marker == "\\boxed{}":
        return _boxed(text)
    marked = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return marked[-1].strip() if marked else None


def _boxed(text: str) -> str | None:
    """Return the content of the last box, which may contain braces."""
    begin = text.rfind("\\boxed{")
    if begin < 0:
        return None
    depth = 0
    for at in range(begin + len("\\boxed"), len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return text[begin + len("\\boxed{") : at].strip()
    return None


_DRAWS_PER_PROMPT = 10  # some problems cannot be made, or are too long


class Problems:
    """The prompts of problems for one model. `max_tokens` bounds a prompt and its answer together."""

    def __init__(self, config: RlveConfig, environments: Environments, folder: Path, max_tokens: int):
        self.tokenizer = of_folder(folder)
        self._config = config
        self._environments = environments
        self._max_tokens = max_tokens

    def room(self, tokens: list[int]) -> int:
        """Return how many tokens an answer to the prompt may have; 0 or less: none."""
        return min(self._config.rollout_max_response_len, self._max_tokens - len(tokens))

    async def wave(
        self, difficulties: Mapping[str, Difficulty], step: int, wave: int
    ) -> list[tuple[Draw, list[int]]]:
        """Return one batch of problems for a step, with their prompts. `wave` counts the step's batches.

        Problems that cannot be made, or leave no room for an answer, are replaced. Raises BadRequest if there
        are not enough.
        """
        found: list[tuple[Draw, list[int]]] = []
        drawn = itertools.islice(
            draws(self._config, difficulties, step, wave), _DRAWS_PER_PROMPT * self._config.wave
        )
        for draw in drawn:
            try:
                question = await self._environments.question(draw.problem)
            except NotMadeError:
                continue
            how, marker = self._config.custom_prompt_preprocessor, self._config.answer_marker_type
            tokens = prompt(question, how, marker, self.tokenizer)
            if self.room(tokens) > 0:
                found.append((draw, tokens))
            if len(found) == self._config.wave:
                return found
        raise BadRequest(
            f"rlve: of {_DRAWS_PER_PROMPT * self._config.wave} problems only {len(found)} could be made and "
            f"fit the model's {self._max_tokens} tokens"
        )
