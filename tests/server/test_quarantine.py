"""Quarantine: the operation that ends every engine is found, whatever runs beside it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tinsmith.server.models.recovery import Quarantine

DEATHS = 3


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_three_deaths_within_the_window() -> None:
    clock = Clock()
    quarantine = Quarantine(DEATHS, 600, clock)
    one, sample = ("req_1", "model"), ("req_2", "")
    assert quarantine.blame([one, sample]) == []
    assert quarantine.blame([one]) == []
    assert quarantine.subjects() == ["req_2", "model"], "the likelier last"
    assert quarantine.requests("model") == {"req_1"}
    assert quarantine.blame([one]) == [one]
    assert quarantine.subjects() == ["req_2"]
    quarantine.acquit("req_2")
    assert quarantine.subjects() == []


def test_deaths_long_ago_do_not_count() -> None:
    clock = Clock()
    quarantine = Quarantine(DEATHS, 600, clock)
    for clock.now in (0, 500, 1000, 1500, 2000):
        assert quarantine.blame([("req_1", "model")]) == []


@given(st.integers(1, 8), st.integers(0, 7), st.randoms())
def test_only_the_deadly_one_is_given_up(count: int, deadly: int, random) -> None:
    """All operations begin together; after the first death they run one by one, until the deadly one has its
    turn."""
    waiting = {(f"req_{index}", f"model_{index}") for index in range(count)}
    poison = (f"req_{deadly}", f"model_{deadly}")
    quarantine = Quarantine(DEATHS, 600, Clock())
    given_up = quarantine.blame(sorted(waiting, key=lambda _: random.random()))
    for _ in range(2 * DEATHS):
        died = False
        for subject in quarantine.subjects():
            (under_way,) = (each for each in waiting if each[1] == subject)
            if under_way == poison:
                given_up += quarantine.blame([under_way])
                died = True
                break
            waiting.discard(under_way)
            quarantine.acquit(subject)
        if not died or given_up:
            break
    assert given_up == ([poison] if deadly < count else [])
