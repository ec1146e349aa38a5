"""A rate limit that allows bursts (Turner's token bucket)."""

from __future__ import annotations


class TokenBucket:
    """Full at first. A request takes a token; tokens come back at the rate."""

    def __init__(self) -> None:
        self._used = 0.0
        self._at = 0.0

    def take(self, rate: float, burst_seconds: float, now: float) -> float:
        """Takes a token and returns 0; or takes none and returns the seconds until there is one.

        Holds `rate * burst_seconds` tokens, but at least one. `now` in seconds, of any clock that only goes
        forward.
        """
        self._used = max(0.0, self._used - rate * (now - self._at))
        self._at = now
        room = max(1.0, rate * burst_seconds)
        if self._used + 1 <= room:
            self._used += 1
            return 0.0
        return (self._used + 1 - room) / rate
