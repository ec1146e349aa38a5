"""The outbox: messages that wait for the engine, in order within a lane, lanes by turns, few bytes at a time.

A lane is a model, or a tenant's samples. Operations wait here by their ids alone; a payload is read when it
is sent, and it is sent when few bytes are unanswered. So neither process holds the payloads of a long queue,
or of a replay, in memory. The engine still sees the next operation of every model, unless it is a large one.
Messages of the server itself that concern no model, such as cancellations, overtake everything else.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, OrderedDict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ..ledger.payloads import PayloadLost

log = logging.getLogger("tinsmith.outbox")

_UNANSWERED_BYTES = 24 << 20  # of all lanes of a kind: training, or samples
_LANE_BYTES = 8 << 20
_SMALL_BYTES = 1 << 20  # a lane with nothing unanswered need not wait for the others to send that
_TRY_AGAIN_SECONDS = 1.0


@dataclass(frozen=True)
class Lane:
    """A queue: the operations of a model, or, without a model, a tenant's samples."""

    model_id: str = ""
    owner: str = ""


@dataclass(frozen=True)
class Entry:
    """An operation that waits in a lane. `message` is None for a payload that is read when it is sent."""

    number: int
    request_id: str
    size: int
    message: bytes | None


class Outbox:
    """Sends messages when there is room for them.

    `load` reads a payload, or returns None for one that is not needed any more. `send` hands a message to the
    socket. `on_lost` gets an operation whose payload cannot be read, its model, and why; what is behind it in
    its lane is dropped.
    """

    def __init__(
        self,
        load: Callable[[str], Awaitable[bytes | None]],
        send: Callable[[bytes], Awaitable[object]],
        on_lost: Callable[[str, str, str], None],
    ):
        self._load = load
        self._send = send
        self._on_lost = on_lost
        self._own: deque[bytes] = deque()
        self._lanes: OrderedDict[Lane, deque[Entry]] = OrderedDict()
        self._waiting: set[str] = set()  # the ids of what is in the lanes, but for what was withdrawn
        self._unanswered: dict[str, tuple[Lane, int]] = {}
        self._lane_bytes: Counter[Lane] = Counter()
        self._bytes: Counter[bool] = Counter()  # of all models, and of all samples
        self._changed = asyncio.Event()
        self._moved = asyncio.Event()
        self._number = 0

    def put_own(self, message: bytes) -> None:
        """Add a message of the server that overtakes what waits."""
        self._own.append(message)
        self._changed.set()

    def put(self, lane: Lane, request_id: str, size: int, message: bytes | None = None) -> None:
        """Add an operation to its lane; `message` takes the place of its payload."""
        self._number += 1
        self._waiting.add(request_id)
        self._lanes.setdefault(lane, deque()).append(Entry(self._number, request_id, size, message))
        self._changed.set()

    def withdraw(self, request_id: str) -> bool:
        """Take back a message; return whether it was still waiting, and will not be sent."""
        was_waiting = request_id in self._waiting
        self._waiting.discard(request_id)
        return was_waiting

    def answered(self, request_id: str) -> None:
        """Note that a request was answered, which makes room for others."""
        lane, size = self._unanswered.pop(request_id, (None, 0))
        if lane is not None:
            self._bytes[bool(lane.model_id)] -= size
            self._lane_bytes[lane] -= size
            if not self._lane_bytes[lane]:
                del self._lane_bytes[lane]
            self._changed.set()

    async def until_sent(self) -> None:
        """Wait until everything that was put here so far has been sent."""
        number = self._number
        while any(queue[0].number <= number for queue in self._lanes.values()):
            self._moved.clear()
            await self._moved.wait()

    async def run_forever(self) -> None:
        while True:
            if self._own:
                await self._send(self._own.popleft())
            elif (lane := self._next()) is not None:
                await self._send_next(lane)
                self._moved.set()
            else:
                self._changed.clear()
                await self._changed.wait()

    def _next(self) -> Lane | None:
        """Return the first lane whose next message there is room for."""
        for lane, queue in self._lanes.items():
            size, total, mine = queue[0].size, self._bytes[bool(lane.model_id)], self._lane_bytes[lane]
            if mine:
                if total + size <= _UNANSWERED_BYTES and mine + size <= _LANE_BYTES:
                    return lane
            elif size <= _SMALL_BYTES or total < _UNANSWERED_BYTES:
                return lane
        return None

    async def _send_next(self, lane: Lane) -> None:
        queue = self._lanes[lane]
        entry = queue[0]
        message = entry.message
        if message is None and entry.request_id in self._waiting:
            try:
                message = await self._load(entry.request_id)
            except PayloadLost as error:
                log.error("operation %s cannot be sent: %s", entry.request_id, error)
                for each in self._lanes.pop(lane):
                    self._waiting.discard(each.request_id)
                self._on_lost(entry.request_id, lane.model_id, error.message)
                return
            except Exception as error:  # whatever it is, others must not wait for ever
                log.error("a payload cannot be read yet: %s", error)
                await asyncio.sleep(_TRY_AGAIN_SECONDS)
                return
        queue.popleft()
        self._lanes.move_to_end(lane)
        if not queue:
            del self._lanes[lane]
        is_wanted = entry.request_id in self._waiting  # it may have been withdrawn meanwhile
        self._waiting.discard(entry.request_id)
        if message is None or not is_wanted:
            return
        if entry.request_id not in self._unanswered:
            size = max(entry.size, 1)
            self._unanswered[entry.request_id] = lane, size
            self._lane_bytes[lane] += size
            self._bytes[bool(lane.model_id)] += size
        await self._send(message)
