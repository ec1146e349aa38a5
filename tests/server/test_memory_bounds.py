"""What the server holds in memory is bounded, whatever clients do and however slowly they read."""

from __future__ import annotations

import asyncio

from tinsmith.engine import messages
from tinsmith.server.operations.operation import Operation
from tinsmith.server.recent import Recent
from tinsmith.server.served import sample_streams
from tinsmith.server.served.sample_streams import SampleStreams


def drawn(request_id: str, begin: int, tokens: int = 1000, k: int = 0) -> messages.Drawn:
    topk = messages.TopK(bytes(4 * tokens * k), bytes(4 * tokens * k), k, tokens) if k else None
    return messages.Drawn(request_id, 0, begin, bytes(4 * tokens), bytes(4 * tokens), topk)


async def read(streams: SampleStreams, operation: Operation) -> list[int]:
    """What a client is told until the answer is there."""
    stream = streams.of(operation.request_id)
    assert stream is not None
    return [each.begin async for each in stream.until_answered(operation)]


def sample(request_id: str) -> Operation:
    return Operation(request_id, "me", "sample", "", 0, {}, None)


async def test_a_quick_reader_is_told_everything() -> None:
    streams, operation = SampleStreams(), sample("a")
    streams.open("a", "me")
    reading = asyncio.ensure_future(read(streams, operation))
    for number in range(3000):  # more bytes than may wait at once
        streams.add(drawn("a", number))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    operation.finished.set()
    assert await reading == list(range(3000))


async def test_a_slow_reader_is_told_the_beginning_and_the_end_has_the_rest() -> None:
    streams, operation = SampleStreams(), sample("a")
    streams.open("a", "me")
    for number in range(3000):
        streams.add(drawn("a", number, k=2))
    stream = streams.of("a")
    assert stream is not None
    assert 0 < stream.waiting_bytes <= sample_streams._STREAM_BYTES
    reading = asyncio.ensure_future(read(streams, operation))
    await asyncio.sleep(0.05)
    streams.add(drawn("a", 3000))  # there is room again, but not for a stream with a gap
    operation.finished.set()
    told = await reading
    assert told == list(range(len(told)))
    assert 10 < len(told) < 100


def test_the_slow_readers_of_one_owner_cost_no_other() -> None:
    streams = SampleStreams()
    for number in range(100):
        streams.open(f"mine-{number}", "me")
        for begin in range(200):
            streams.add(drawn(f"mine-{number}", begin))
    waiting = streams.of("mine-0").of_owner  # type: ignore[union-attr]
    assert waiting.bytes <= sample_streams._OWNER_BYTES
    streams.open("theirs", "you")
    streams.add(drawn("theirs", 0))
    assert streams.of("theirs").waiting_bytes > 0  # type: ignore[union-attr]
    for number in range(100):
        streams.close(f"mine-{number}")
    streams.close("mine-0")
    assert waiting.bytes == waiting.streams == 0
    assert set(streams._waiting) == {"you"}


def test_what_was_used_last_is_remembered() -> None:
    recent: Recent[int, str] = Recent(3)
    for number in range(3):
        recent[number] = str(number)
    assert recent.get(0, None) == "0"
    recent[3] = "3"
    assert [recent.get(number, None) for number in range(4)] == ["0", None, "2", "3"]
    recent[2] = "two"
    assert recent.get(2, None) == "two"
    recent.discard(2)
    recent.discard(2)
    assert len(recent) == 2
