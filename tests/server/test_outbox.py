"""The outbox: operations go to the engine in order and by turns, with few bytes in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from tinsmith.server.errors import Unavailable
from tinsmith.server.ledger.payloads import PayloadLost
from tinsmith.server.supervision import engine_process
from tinsmith.server.supervision.engine_process import Lane, Outbox

MIB = 1 << 20


class Socket:
    """An outbox over payloads that are said by their names, and an engine that answers when it is told to."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.lost: list[tuple[str, str]] = []
        self.loaded: list[str] = []
        self.faults: dict[str, list[Exception]] = {}
        self.gone: set[str] = set()
        self.outbox = Outbox(self._load, self._lost)
        self.outbox.open()

    def _lost(self, request_id: str, model_id: str, _why: str) -> None:
        self.lost.append((request_id, model_id))

    async def _load(self, request_id: str) -> bytes | None:
        self.loaded.append(request_id)
        await asyncio.sleep(0)
        if self.faults.get(request_id):
            raise self.faults[request_id].pop(0)
        return None if request_id in self.gone else request_id.encode()

    async def send(self, message: bytes, copy: bool) -> None:
        assert copy == (len(message) < 64 << 10)
        self.sent.append(message.decode())

    async def settle(self) -> None:
        for _ in range(200):
            await asyncio.sleep(0)

    async def answer(self, *names: str) -> None:
        for name in names:
            self.outbox.answered(name)
        await self.settle()


@pytest.fixture
async def socket() -> AsyncIterator[Socket]:
    made = Socket()
    task = asyncio.ensure_future(made.outbox.send_forever(made))
    yield made
    task.cancel()


async def test_a_lane_keeps_its_order_and_lanes_take_turns(socket: Socket) -> None:
    for number in range(3):
        for model in "ab":
            socket.outbox.put(Lane(model), f"{model}{number}", 100)
    await socket.settle()
    assert socket.sent == ["a0", "b0", "a1", "b1", "a2", "b2"]


async def test_no_more_than_a_bound_is_unanswered(socket: Socket) -> None:
    for model in "abcdefgh":
        for number in range(10):
            socket.outbox.put(Lane(model), f"{model}{number}", 4 * MIB)
    await socket.settle()
    assert len(socket.sent) == 6, "24 MiB"
    assert set(socket.loaded) == set(socket.sent), "what waits is not read"
    while len(socket.sent) < 80:
        before = len(socket.sent)
        await socket.answer(socket.sent[before - 6])
        assert len(socket.sent) == before + 1
    for model in "abcdefgh":
        assert [name for name in socket.sent if name[0] == model] == [f"{model}{n}" for n in range(10)]


async def test_one_model_s_queue_leaves_room_for_others(socket: Socket) -> None:
    for number in range(100):
        socket.outbox.put(Lane("busy"), f"busy{number}", MIB)
    await socket.settle()
    assert len(socket.sent) == 8
    socket.outbox.put(Lane("other"), "other", MIB)
    socket.outbox.put(Lane(owner="me"), "sample", MIB)
    await socket.settle()
    assert socket.sent[8:] == ["other", "sample"]


async def test_small_operations_of_other_models_do_not_wait_for_large_ones(socket: Socket) -> None:
    socket.outbox.put(Lane("large"), "large", 200 * MIB)
    socket.outbox.put(Lane("large"), "large, too", 200 * MIB)
    socket.outbox.put(Lane("other large"), "other", 2 * MIB)
    socket.outbox.put(Lane("small"), "small", 1000)
    await socket.settle()
    assert socket.sent == ["large", "small"]
    await socket.answer("large")
    assert socket.sent == ["large", "small", "other", "large, too"]


async def test_own_messages_overtake(socket: Socket) -> None:
    for number in range(20):
        socket.outbox.put(Lane("a"), str(number), 4 * MIB)
    await socket.settle()
    socket.outbox.put_own(b"cancel")
    await socket.settle()
    assert socket.sent == ["0", "1", "cancel"]


async def test_withdrawn_operations_are_not_sent(socket: Socket) -> None:
    for number in range(4):
        socket.outbox.put(Lane("a"), str(number), 4 * MIB)
    await socket.settle()
    assert not socket.outbox.withdraw("0"), "the engine has it"
    assert socket.outbox.withdraw("2")
    assert not socket.outbox.withdraw("2")
    await socket.answer("0", "1")
    assert socket.sent == ["0", "1", "3"]
    assert "2" not in socket.loaded


async def test_until_sent(socket: Socket) -> None:
    for number in range(4):
        socket.outbox.put(Lane("a"), str(number), 8 * MIB)
    waiting = asyncio.ensure_future(socket.outbox.until_sent())
    await socket.settle()
    socket.outbox.put(Lane("a"), "later", 8 * MIB)
    for number in range(3):
        assert not waiting.done()
        await socket.answer(str(number))
    assert socket.sent == ["0", "1", "2", "3"]
    await asyncio.wait_for(waiting, 1)


async def test_a_payload_that_is_not_needed_any_more_is_passed_over(socket: Socket) -> None:
    socket.gone.add("1")
    for number in range(3):
        socket.outbox.put(Lane("a"), str(number), 8 * MIB)
    await socket.settle()
    await socket.answer("0")
    assert socket.sent == ["0", "2"]


async def test_a_lost_payload_ends_its_lane_alone(socket: Socket) -> None:
    socket.faults["a1"] = [PayloadLost("it is gone")]
    for number in range(3):
        for model in "ab":
            socket.outbox.put(Lane(model), f"{model}{number}", 100)
    await socket.settle()
    assert socket.sent == ["a0", "b0", "b1", "b2"]
    assert socket.lost == [("a1", "a")]


async def test_a_ledger_that_cannot_be_read_for_a_moment_is_asked_again(
    socket: Socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_process, "_TRY_AGAIN_SECONDS", 0.0)
    socket.faults["a0"] = [Unavailable("locked"), OSError("input/output error")]
    socket.outbox.put(Lane("a"), "a0", 100)
    socket.outbox.put(Lane("a"), "a1", 100)
    await socket.settle()
    assert socket.sent == ["a0", "a1"]
