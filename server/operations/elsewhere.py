"""Who else than the engine answers samples."""

from __future__ import annotations

from typing import Protocol

from ...engine import messages
from .operation import Operation


class Elsewhere(Protocol):
    def take(self, operation: Operation, sample: messages.Sample) -> bool:
        """Whether a sample is answered there, by `Operations.on_answer`; it may be told more than once."""

    def cancel(self, operation: Operation) -> bool:
        """Whether a sample was being answered there; its answer is then that it was cancelled."""


class Nowhere:
    def take(self, operation: Operation, sample: messages.Sample) -> bool:
        return False

    def cancel(self, operation: Operation) -> bool:
        return False
