"""Who else than the engine can draw samples."""

from __future__ import annotations

from typing import Literal, Protocol

from ...engine import messages
from .operation import Answer, Operation


class Outcome(Protocol):
    """Where whoever draws a sample says what came of it."""

    def on_answer(self, answer: Answer) -> None:
        """The sample has this answer."""

    def fail(
        self, operations: list[Operation], message: str, category: Literal["user", "server"] = "user"
    ) -> None:
        """The samples cannot be drawn."""

    def send_to_engine(self, operation: Operation) -> None:
        """The engine is to draw the sample after all."""


class SampleDrawer(Protocol):
    """Draws samples in the engine's place."""

    def take(self, operation: Operation, sample: messages.Sample, outcome: Outcome) -> bool:
        """Whether it draws this sample, and tells `outcome` of the answer; it may be asked more than once."""

    def cancel(self, operation: Operation) -> bool:
        """Whether it was drawing this sample, which it now stops."""


class EngineOnly:
    """No SGLang server: the engine draws every sample."""

    def take(self, operation: Operation, sample: messages.Sample, outcome: Outcome) -> bool:
        return False

    def cancel(self, operation: Operation) -> bool:
        return False
