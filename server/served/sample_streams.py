"""Tokens of samples as they are drawn, on their way from the engine to who streams them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from ...engine import messages
from ..operations.operation import Operation


@dataclass(eq=False)
class SampleStream:
    """Of one request."""

    drawn: asyncio.Queue[messages.Drawn] = field(default_factory=asyncio.Queue)

    async def until_answered(self, operation: Operation) -> AsyncIterator[messages.Drawn]:
        """What is drawn, until the answer is there; it has all tokens, also those that were not told of."""
        finished = asyncio.ensure_future(operation.finished.wait())
        try:
            while not finished.done():
                drawn = asyncio.ensure_future(self.drawn.get())
                await asyncio.wait({drawn, finished}, return_when=asyncio.FIRST_COMPLETED)
                if drawn.done():
                    yield drawn.result()
                else:
                    drawn.cancel()
        finally:
            finished.cancel()


class SampleStreams:
    """By request id. One that nobody has opened is not kept."""

    def __init__(self) -> None:
        self._streams: dict[str, SampleStream] = {}

    def open(self, request_id: str) -> None:
        """Before the request goes to the engine."""
        self._streams[request_id] = SampleStream()

    def of(self, request_id: str) -> SampleStream | None:
        return self._streams.get(request_id)

    def close(self, request_id: str) -> None:
        self._streams.pop(request_id, None)

    def add(self, drawn: messages.Drawn) -> None:
        if (stream := self._streams.get(drawn.request_id)) is not None:
            stream.drawn.put_nowait(drawn)
