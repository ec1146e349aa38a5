"""The engine's silence, measured with clocks that jump."""

from __future__ import annotations

from tinsmith.server.supervision.engine_process import Silence


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_silence_adds_up_until_something_is_heard() -> None:
    clock = Clock()
    silence = Silence(1.0, clock)
    for _ in range(60):
        clock.now += 1.0
        silence.look()
    assert silence.seconds == 60
    silence.seconds = 0.0
    clock.now += 1.5
    silence.look()
    assert silence.seconds == 1.5


def test_a_listener_that_was_away_has_heard_no_silence() -> None:
    clock = Clock()
    silence = Silence(1.0, clock)
    clock.now += 3600.0  # the machine slept, or the server was stopped
    silence.look()
    assert silence.seconds == 2
    clock.now += 1.0
    silence.look()
    assert silence.seconds == 3
