"""Tokens of samples as they are drawn, on their way from the engine to who streams them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from ...engine import messages
from ..recent import held_bytes
from .operation import Operation

_STREAM_BYTES, _OWNER_BYTES = 1 << 20, 64 << 20  # that wait for clients, of one stream and of all of an owner


@dataclass(eq=False)
class Waiting:
    """What waits for the clients of one owner: in how many streams, and how many bytes."""

    streams: int = 0
    bytes: int = 0


@dataclass(eq=False)
class SampleStream:
    """Of one request. A client that reads too slowly is told no more until the end, which has everything."""

    owner: str
    of_owner: Waiting
    _drawn: deque[messages.Drawn] = field(default_factory=deque)
    _more: asyncio.Event = field(default_factory=asyncio.Event)
    waiting_bytes: int = 0
    is_cut: bool = False

    async def until_answered(self, operation: Operation) -> AsyncIterator[messages.Drawn]:
        """What is drawn, until the answer is there; it has all tokens, also those that were not told of."""
        finished = asyncio.ensure_future(operation.finished.wait())
        try:
            while not finished.done():
                more = asyncio.ensure_future(self._more.wait())
                await asyncio.wait({more, finished}, return_when=asyncio.FIRST_COMPLETED)
                more.cancel()
                if self._drawn:
                    yield self._take()
        finally:
            finished.cancel()

    def _take(self) -> messages.Drawn:
        drawn = self._drawn.popleft()
        self._count(-held_bytes(drawn))
        if not self._drawn:
            self._more.clear()
        return drawn

    def add(self, drawn: messages.Drawn) -> None:
        size = held_bytes(drawn)
        self.is_cut |= self.waiting_bytes + size > _STREAM_BYTES or self.of_owner.bytes + size > _OWNER_BYTES
        if not self.is_cut:
            self._drawn.append(drawn)
            self._count(size)
            self._more.set()

    def close(self) -> None:
        self.is_cut = True
        self._drawn.clear()
        self._count(-self.waiting_bytes)

    def _count(self, size: int) -> None:
        self.waiting_bytes += size
        self.of_owner.bytes += size


class SampleStreams:
    """By request id. One that nobody has opened is not kept."""

    def __init__(self) -> None:
        self._streams: dict[str, SampleStream] = {}
        self._waiting: dict[str, Waiting] = {}  # by owner

    def open(self, request_id: str, owner: str) -> None:
        """Before the request goes to the engine."""
        waiting = self._waiting.setdefault(owner, Waiting())
        waiting.streams += 1
        self._streams[request_id] = SampleStream(owner, waiting)

    def of(self, request_id: str) -> SampleStream | None:
        return self._streams.get(request_id)

    def close(self, request_id: str) -> None:
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            stream.close()
            stream.of_owner.streams -= 1
            if not stream.of_owner.streams:
                del self._waiting[stream.owner]

    def add(self, drawn: messages.Drawn) -> None:
        if (stream := self._streams.get(drawn.request_id)) is not None:
            stream.add(drawn)
