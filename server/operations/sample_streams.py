"""Streams to the clients of samples: tokens as they are drawn, and which samples have been answered.

`SampleStreams` passes on the tokens of single requests, from the engine to the connection that streams them.

`Completions` lets one long poll wait for all samples that a client has asked of a sampling session. It lists
request ids as their answers come, each under a cursor, a number that only grows. A poll names the newest
cursor that the client has seen, and everything up to it is forgotten. The lists are in memory only: after a
restart, after a long silence, or when there are too many lists, the next poll makes its list again from the
ledger. It may then repeat what the client has seen, but never leaves out what the client has not seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from sqlalchemy import Connection, Row

from ...engine import messages
from ..ledger import operations as rows
from ..ledger.ledger import Ledger
from .operation import Operation, held_bytes
from .operations import Operations

_STREAM_BYTES, _OWNER_BYTES = 1 << 20, 64 << 20  # that wait for clients, of one stream and of all of an owner


@dataclass(eq=False)
class Waiting:
    """Counts what waits for the clients of one owner: streams, and their bytes."""

    streams: int = 0
    bytes: int = 0


@dataclass(eq=False)
class SampleStream:
    """The tokens of one request, on their way to its client.

    A client that reads too slowly gets no more until the end, when it gets all the rest.
    """

    owner: str
    of_owner: Waiting
    _drawn: deque[messages.Drawn] = field(default_factory=deque)
    _more: asyncio.Event = field(default_factory=asyncio.Event)
    waiting_bytes: int = 0
    is_cut: bool = False

    async def until_answered(self, operation: Operation) -> AsyncIterator[messages.Drawn]:
        """Yield tokens as they are drawn, until the answer is there, which has all tokens once more."""
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
    """The streams that are open, by request id. Tokens of other requests are dropped."""

    def __init__(self) -> None:
        self._streams: dict[str, SampleStream] = {}
        self._waiting: dict[str, Waiting] = {}  # by owner

    def open(self, request_id: str, owner: str) -> None:
        """Open a stream, before its request goes to the engine."""
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


SEQ_IDS_PER_CLIENT = 1_000_000_000
"""The n-th copy of a sampling client numbers its samples from n times as many."""
_SILENT_SECONDS = 3600.0  # a stream that nobody polls for so long is dropped
_MOST_STREAMS, _MOST_ANSWERED = 16_384, 65_536  # at once, and of a stream since its last poll
_CLOCK_SECONDS = 3600.0  # by so much the clock may have been set back before a restart


@dataclass(frozen=True, slots=True)
class Completion:
    cursor: int
    request_id: str
    failed: bool


@dataclass(eq=False)
class Stream:
    """The answers to one client's samples of a sampling session.

    `cursor` is that of the newest completion. `changed` is set, and replaced, at each new one.
    """

    cursor: int
    answered: deque[Completion] = field(default_factory=deque)
    waiting: set[str] = field(default_factory=set)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    polled_at: float = 0.0  # of time.monotonic
    opened: asyncio.Task[None] | None = None

    def follow(self, operation: Operation) -> None:
        """List the operation once it is answered."""
        if operation.settled:
            self._add(operation.request_id, isinstance(operation.answer, messages.Failed))
        elif operation.request_id not in self.waiting:
            self.waiting.add(operation.request_id)
            operation.when_answered(self._answered)

    def _answered(self, operation: Operation) -> None:
        self.waiting.discard(operation.request_id)
        self._add(operation.request_id, isinstance(operation.answer, messages.Failed))

    def _add(self, request_id: str, failed: bool) -> None:
        # The time, so that cursors grow over restarts.
        self.cursor = max(self.cursor + 1, int(time.time() * 1e6))
        self.answered.append(Completion(self.cursor, request_id, failed))
        self.wake()

    def wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    def list_again(self, finished: list[Row]) -> None:
        """List samples from before the stream was opened, unless they have been listed meanwhile."""
        listed = {each.request_id for each in self.answered}
        for row in finished:
            if row.id not in listed:
                self._add(row.id, row.state != "done")

    def after(self, cursor: int) -> list[Completion]:
        while self.answered and self.answered[0].cursor <= cursor:
            self.answered.popleft()
        return list(self.answered)


class Completions:
    """Lists the answered samples of sampling sessions, one stream per client of each."""

    def __init__(self, ledger: Ledger, operations: Operations):
        self._ledger = ledger
        self._operations = operations
        self._streams: dict[tuple[str, int], Stream] = {}

    def accepted(self, sampler_id: str, seq_id: int, operation: Operation) -> None:
        """Follow a sample that is in the ledger, new or submitted again."""
        key = (sampler_id, seq_id // SEQ_IDS_PER_CLIENT)
        stream = self._streams.get(key)
        if stream is None:
            return
        stream.follow(operation)
        if len(stream.answered) > _MOST_ANSWERED:
            del self._streams[key]  # its next poll makes it again, from the ledger

    async def poll(
        self, session_id: str, sampler_id: str, client: int, cursor: int, seconds: float
    ) -> tuple[list[Completion], int]:
        """Return what was answered after `cursor`, and the new cursor; wait so long for a first answer."""
        stream = await self._open(session_id, sampler_id, client, cursor)
        stream.polled_at = time.monotonic()
        answered = stream.after(cursor)
        if not answered and seconds > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stream.changed.wait(), seconds)
            answered = stream.after(cursor)
        return answered, answered[-1].cursor if answered else cursor

    def wake_all(self) -> None:
        """Let every poll end."""
        for stream in self._streams.values():
            stream.wake()

    async def _open(self, session_id: str, sampler_id: str, client: int, cursor: int) -> Stream:
        stream = self._streams.get((sampler_id, client))
        if stream is None:
            self._drop_silent()
            # Known before the ledger is read: a sample that is accepted meanwhile is in one of the two.
            stream = self._streams[sampler_id, client] = Stream(cursor, polled_at=time.monotonic())
            stream.opened = asyncio.ensure_future(self._fill(stream, session_id, sampler_id, client, cursor))
        assert stream.opened is not None
        try:
            await asyncio.shield(stream.opened)  # a client that hangs up does not end it for the others
        except Exception:
            if self._streams.get((sampler_id, client)) is stream:
                del self._streams[sampler_id, client]
            raise
        return stream

    async def _fill(self, stream: Stream, session_id: str, sampler_id: str, client: int, cursor: int) -> None:
        def read(connection: Connection) -> tuple[list[Row], list[Row]]:
            since = cursor / 1e6 - _CLOCK_SECONDS
            found = (
                rows.unanswered(connection, session_id, sampler_id),
                rows.finished_since(connection, session_id, sampler_id, since),
            )
            unanswered, finished = (
                [row for row in part if row.sample_number // SEQ_IDS_PER_CLIENT == client] for part in found
            )
            return unanswered, finished

        unanswered, finished = await self._ledger.read(read)
        stream.list_again(finished)
        for row in unanswered:
            stream.follow(self._operations.load(row))

    def _drop_silent(self) -> None:
        silent_since = time.monotonic() - _SILENT_SECONDS
        for key, stream in list(self._streams.items()):
            if stream.polled_at < silent_since:
                del self._streams[key]
        while len(self._streams) >= _MOST_STREAMS:
            del self._streams[next(iter(self._streams))]  # the one that was opened first
