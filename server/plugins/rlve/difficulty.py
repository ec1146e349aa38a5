"""How hard an environment's problems are: a window of levels that moves up when its top is mastered.

Source: Zeng et al. 2025, "RLVE: Scaling Up Reinforcement Learning for Language Models with Adaptive
Verifiable Environments" (arXiv:2511.07317), section 2. Problems are drawn from the levels of a window that
ends at `top`. Samples at the top are counted; when there are enough of them, and so many are right, the top
is one higher. The count begins anew either way. What is special here: reasoning-gym's curricula have a
highest level, at which the top stays.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any


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
