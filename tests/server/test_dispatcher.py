"""Whatever order operations arrive in, they are released by number, each once."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st
from tinsmith.server.operations.operation import Dispatcher


@dataclass
class Operation:
    model_id: str
    seq_id: int
    settled: bool = False
    answer: None = None

    @property
    def expired(self) -> bool:
        return self.settled


class Recorded:
    """A dispatcher, what it released and what it gave up."""

    def __init__(self, gap_grace_seconds: float = 60):
        self.released: list[Operation] = []
        self.given_up: list[tuple[list[int], int]] = []
        self.dispatcher = Dispatcher(gap_grace_seconds)
        self.dispatcher.released.subscribe(self.released.append)
        self.dispatcher.gave_up.subscribe(
            lambda operations, missing: self.given_up.append(([op.seq_id for op in operations], missing))
        )

    def numbers(self, model_id: str) -> list[int]:
        return [operation.seq_id for operation in self.released if operation.model_id == model_id]


@st.composite
def arrivals(draw) -> tuple[list[tuple[str, int]], dict[str, int], set[tuple[str, int]]]:
    """Operations of two models in any order, some of them twice; how many each has; those refused."""
    counts = {model: draw(st.integers(0, 12)) for model in "ab"}
    every = [(model, number) for model, count in counts.items() for number in range(1, count + 1)]
    twice = draw(st.lists(st.sampled_from(every), max_size=5)) if every else []
    refused = draw(st.sets(st.sampled_from(every), max_size=4)) if every else set()
    return draw(st.permutations(every + twice)), counts, refused


@given(arrivals())
@settings(max_examples=300, deadline=None)
def test_released_in_order_exactly_once(case) -> None:
    order, counts, refused = case

    async def run() -> None:
        recorded = Recorded()
        for model in counts:
            recorded.dispatcher.open(model, 1)
        for model, number in order:
            recorded.dispatcher.add(Operation(model, number, settled=(model, number) in refused))
        for model, count in counts.items():
            expected = [number for number in range(1, count + 1) if (model, number) not in refused]
            assert recorded.numbers(model) == expected
            assert recorded.dispatcher.next_seq(model) == count + 1
        assert recorded.given_up == []

    asyncio.run(run())


@given(st.permutations(range(5, 12)), st.integers(5, 11))
@settings(max_examples=100, deadline=None)
def test_nothing_after_a_gap_is_released(order: list[int], missing: int) -> None:
    async def run() -> None:
        recorded = Recorded()
        recorded.dispatcher.open("a", 5)
        for number in order:
            if number != missing:
                recorded.dispatcher.add(Operation("a", number))
        assert recorded.numbers("a") == list(range(5, missing))

    asyncio.run(run())


async def test_a_gap_that_closes_in_time_is_none() -> None:
    recorded = Recorded(gap_grace_seconds=0.05)
    recorded.dispatcher.open("a", 1)
    recorded.dispatcher.add(Operation("a", 2))
    recorded.dispatcher.add(Operation("a", 1))
    await asyncio.sleep(0.1)
    assert recorded.numbers("a") == [1, 2]
    assert recorded.given_up == []


async def test_a_gap_that_stays_open_gives_up_what_waited() -> None:
    recorded = Recorded(gap_grace_seconds=0.05)
    recorded.dispatcher.open("a", 1)
    for number in (1, 3, 6, 4):
        recorded.dispatcher.add(Operation("a", number))
    await asyncio.sleep(0.1)
    assert recorded.given_up == [([3, 4, 6], 2)]
    recorded.dispatcher.add(Operation("a", 2))  # too late
    recorded.dispatcher.add(Operation("a", 7))
    assert recorded.numbers("a") == [1, 7]


async def test_the_grace_begins_anew_with_every_gap() -> None:
    recorded = Recorded(gap_grace_seconds=0.2)
    recorded.dispatcher.open("a", 1)
    recorded.dispatcher.add(Operation("a", 2))
    await asyncio.sleep(0.15)
    recorded.dispatcher.add(Operation("a", 4))
    recorded.dispatcher.add(Operation("a", 1))  # closes the first gap; the second is new
    await asyncio.sleep(0.1)
    assert recorded.given_up == []
    await asyncio.sleep(0.2)
    assert recorded.given_up == [([4], 3)]


async def test_operations_without_numbers_come_after_those_that_arrived() -> None:
    recorded = Recorded()
    recorded.dispatcher.open("a", 1)
    recorded.dispatcher.add(Operation("a", 1))
    recorded.dispatcher.add(Operation("a", 3))
    assert (recorded.dispatcher.last_seq("a"), recorded.dispatcher.reserve("a")) == (3, 4)
    assert recorded.dispatcher.reserve("a") == 5, "two that are about to arrive have two numbers"
