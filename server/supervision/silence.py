"""For how long something has been silent, as its listener has lived through it.

A listener that was stopped, or whose machine was suspended, has heard nothing and must not conclude that
there was nothing to hear. So time counts only as far as the listener looks at the clock: a longer gap
between two looks counts as two of the usual ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class Silence:
    """`seconds` since `heard`, by looks that are to come every `look_seconds`."""

    def __init__(self, look_seconds: float, clock: Callable[[], float] = time.monotonic):
        self._look_seconds = look_seconds
        self._clock = clock
        self._looked_at = clock()
        self.seconds = 0.0

    def heard(self) -> None:
        self.seconds = 0.0

    def look(self) -> None:
        now = self._clock()
        self.seconds += min(now - self._looked_at, 2 * self._look_seconds)
        self._looked_at = now
