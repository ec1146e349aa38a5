"""The order of a model's operations: released strictly by seq_id, each once.

Clients number the operations of a model 1, 2, 3, … and may send them out of order; what arrives early is
held. A number that never arrives (the client gave up on its submit) would hold everything after it for
ever. So the dispatcher waits `gap_grace_seconds` for a missing number, longer than a client keeps resending,
and then gives up the held operations, because without the missing one they would train something else. A
number that was refused at its submit is recorded, and leaves no gap.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from ..events import Event
from .operation import Operation


@dataclass
class Lane:
    """The state of one model's sequence: the number whose turn it is, and operations that came early."""

    next_seq: int
    reserved: int = 0  # numbers up to this are given to operations that are about to arrive
    held: dict[int, Operation] = field(default_factory=dict)
    gap_timer: asyncio.TimerHandle | None = None


class Dispatcher:
    """Releases each model's operations in order.

    `released(operation)`: it is the operation's turn. `gave_up(operations, missing_seq)`: the number
    `missing_seq` has not arrived in `gap_grace_seconds`, and these operations after it are not run.
    """

    def __init__(self, gap_grace_seconds: float):
        self.gap_grace_seconds = gap_grace_seconds
        self.released: Event[[Operation]] = Event()
        self.gave_up: Event[[list[Operation], int]] = Event()
        self._lanes: dict[str, Lane] = {}

    def open(self, model_id: str, next_seq: int) -> None:
        """Begin a model's sequence at `next_seq`: the operations before it have had their turn."""
        self._lanes.setdefault(model_id, Lane(next_seq))

    def close(self, model_id: str) -> None:
        lane = self._lanes.pop(model_id, None)
        if lane is not None and lane.gap_timer is not None:
            lane.gap_timer.cancel()

    def next_seq(self, model_id: str) -> int:
        """Return the number whose turn it is."""
        return self._lanes[model_id].next_seq

    def last_seq(self, model_id: str) -> int:
        """Return the highest number that has arrived, or is about to."""
        lane = self._lanes[model_id]
        return max(lane.next_seq - 1, lane.reserved, *lane.held)

    def reserve(self, model_id: str) -> int:
        """Return a number after all others, for a client without numbers. The operation has to arrive."""
        lane = self._lanes[model_id]
        lane.reserved = self.last_seq(model_id) + 1
        return lane.reserved

    def add(self, operation: Operation) -> None:
        """Take an operation that has arrived. One whose number has had its turn is not run again."""
        lane = self._lanes[operation.model_id]
        if operation.seq_id < lane.next_seq:
            return
        lane.held.setdefault(operation.seq_id, operation)
        self._advance(operation.model_id, lane)

    def _advance(self, model_id: str, lane: Lane) -> None:
        started_at = lane.next_seq
        while (operation := lane.held.pop(lane.next_seq, None)) is not None:
            lane.next_seq += 1
            if not operation.settled:
                self.released(operation)
        moved = lane.next_seq != started_at
        if lane.gap_timer is not None and (moved or not lane.held):
            lane.gap_timer.cancel()
            lane.gap_timer = None
        if lane.held and lane.gap_timer is None:
            loop = asyncio.get_running_loop()
            lane.gap_timer = loop.call_later(self.gap_grace_seconds, self._gap_stayed_open, model_id)

    def _gap_stayed_open(self, model_id: str) -> None:
        lane = self._lanes[model_id]
        lane.gap_timer = None
        missing = lane.next_seq
        lane.next_seq = max(lane.held) + 1
        given_up = [lane.held.pop(seq_id) for seq_id in sorted(lane.held)]
        self.gave_up([operation for operation in given_up if not operation.settled], missing)
