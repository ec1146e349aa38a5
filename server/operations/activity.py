"""How far each model has come since the server's start, for pages that show it live."""

from __future__ import annotations

from collections import OrderedDict

from .operation import Operation

_MODELS = 256  # of an owner


class Activity:
    """Counts the answered operations of each owner's most recently active models."""

    def __init__(self) -> None:
        self._of_owner: dict[str, OrderedDict[str, int]] = {}

    def answered(self, operation: Operation) -> None:
        if operation.model_id:
            self._count(operation.owner, operation.model_id)

    def reported(self, owner: str, model_id: str) -> None:
        """Metrics of the model came from its client."""
        self._count(owner, model_id)

    def of(self, owner: str) -> dict[str, int]:
        """By model id: a number that changes with each answer."""
        return dict(self._of_owner.get(owner, {}))

    def _count(self, owner: str, model_id: str) -> None:
        counts = self._of_owner.setdefault(owner, OrderedDict())
        counts[model_id] = counts.get(model_id, 0) + 1
        counts.move_to_end(model_id)
        if len(counts) > _MODELS:
            counts.popitem(last=False)
