"""Scheduling: one ordered queue per model, and turns that go round the models.

A unit is what the device does in one go: the operation at the head of one model's queue, or several small
`ForwardBackward`s from the heads of several queues that fit one device batch. A long unit takes many turns (a
micro-batch each), so a model with much to do delays the others by one micro-batch, not by all of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

from . import messages

ModelOperation = (
    messages.CreateModel
    | messages.ForwardBackward
    | messages.OptimStep
    | messages.DropGradients
    | messages.SaveState
    | messages.LoadState
    | messages.SaveSampler
    | messages.DeleteModel
)


@dataclass(eq=False)
class Unit:
    """Operations that run together. `progress` is the running work, advanced once per turn; None: not begun.

    `seconds` is the time of its earlier turns; the current one began at `turn_began` (`time.perf_counter`).
    """

    operations: list[ModelOperation]
    progress: Iterator[None] | None = None
    seconds: float = 0.0
    turn_began: float = 0.0


class Scheduler:
    """Queues of operations. Each model's run in order of arrival; models take turns in a ring.

    Operations of equal `batch_key` may share a device batch (None: runs alone) of at most `batch_tokens`:
    sharing pays while batches are small.
    """

    def __init__(self, batch_key: Callable[[ModelOperation], Hashable | None], batch_tokens: int):
        self._batch_key = batch_key
        self._batch_tokens = batch_tokens
        self._queues: dict[str, deque[ModelOperation]] = {}
        self._ring: deque[str] = deque()
        self._running: dict[str, Unit] = {}

    def __bool__(self) -> bool:
        """Return whether there is anything to run."""
        return bool(self._queues)

    def is_running(self, model_id: str) -> bool:
        """Return whether an operation of the model has begun and not ended."""
        return model_id in self._running

    def add(self, operation: ModelOperation) -> None:
        if operation.model_id not in self._queues:
            self._queues[operation.model_id] = deque()
            self._ring.append(operation.model_id)
        self._queues[operation.model_id].append(operation)

    def next(self) -> Unit | None:
        """Return the unit of the next turn: the running one until all of it is finished, or a new one."""
        if not self._ring:
            return None
        model_id = self._ring[0]
        unit = self._running.get(model_id) or self._begin(model_id)
        self._ring.rotate(-1)
        return unit

    def finish(self, operation: ModelOperation) -> None:
        """Remove an answered unit, so that what waits behind it may run."""
        model_id = operation.model_id
        if unit := self._running.get(model_id):
            if operation in unit.operations:
                unit.operations.remove(operation)
            if all(other.model_id != model_id for other in unit.operations):
                del self._running[model_id]
        self._queues[model_id].remove(operation)
        if not self._queues[model_id]:
            del self._queues[model_id]
            self._ring.remove(model_id)

    def cancel(self, request_id: str) -> ModelOperation | None:
        """Remove an operation, waiting or running, if it is here. The rest of its unit starts again."""
        for operation in (operation for queue in self._queues.values() for operation in queue):
            if operation.request_id == request_id:
                unit = self._running.get(operation.model_id)
                if unit and operation in unit.operations:
                    unit.progress = None
                self.finish(operation)
                return operation
        return None

    def _begin(self, leader: str) -> Unit:
        """Make a unit of the leader's first operation and those that may share its batch, in ring order."""
        first = self._queues[leader][0]
        operations, key, tokens = [first], self._batch_key(first), batch_tokens(first)
        if key is not None:
            for model_id in self._ring:
                if model_id == leader or model_id in self._running:
                    continue
                head = self._queues[model_id][0]
                if self._batch_key(head) == key and tokens + batch_tokens(head) <= self._batch_tokens:
                    operations.append(head)
                    tokens += batch_tokens(head)
        unit = Unit(operations)
        for operation in operations:
            self._running[operation.model_id] = unit
        return unit


def batch_tokens(operation: ModelOperation) -> int:
    """Return how many tokens an operation adds to a device batch."""
    if isinstance(operation, messages.ForwardBackward):
        return sum(len(datum.tokens) for datum in operation.data) // 4  # int32
    return 0
