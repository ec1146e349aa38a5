"""Operations that have no answer yet."""

from __future__ import annotations

from .operation import Operation


class PendingOperations:
    """By id, and by model: a submit looks at those of its own model, whatever the others have queued."""

    def __init__(self) -> None:
        self._by_id: dict[str, Operation] = {}
        self._of_model: dict[str, dict[str, Operation]] = {}

    def get(self, request_id: str) -> Operation | None:
        return self._by_id.get(request_id)

    def add(self, operation: Operation) -> None:
        self._by_id[operation.request_id] = operation
        self._of_model.setdefault(operation.model_id, {})[operation.request_id] = operation

    def discard(self, request_id: str) -> None:
        operation = self._by_id.pop(request_id, None)
        if operation is not None:
            mine = self._of_model[operation.model_id]
            del mine[request_id]
            if not mine:
                del self._of_model[operation.model_id]

    def all(self) -> list[Operation]:
        """Oldest first."""
        return list(self._by_id.values())

    def of_model(self, model_id: str) -> list[Operation]:
        """Oldest first."""
        return list(self._of_model.get(model_id, {}).values())
