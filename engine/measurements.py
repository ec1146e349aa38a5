"""Measurements of the engine's work and memory, which the server publishes as metrics."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from . import messages

REPORT_SECONDS = 1.0
"""The shortest time between two reports."""


class Measurements:
    """Counters of one engine process. `send` hands a report to the server."""

    def __init__(self, send: Callable[[messages.Measured], None]):
        self._send = send
        self._lock = threading.Lock()
        self._counters: dict[str, float] = {}
        self._has_news = True
        self._reported_at = float("-inf")

    def add(self, name: str, amount: float = 1.0) -> None:
        """Add to a counter. Safe to call from any thread."""
        with self._lock:
            self._counters[name] = self._counters.get(name, 0.0) + amount
            self._has_news = True

    def touch(self) -> None:
        """Note that the gauges may have changed."""
        self._has_news = True

    def compiled(self, from_cache: bool, seconds: float) -> None:
        """Count a program that was compiled, or read from the cache of compiled programs."""
        self.add("compilations/cache" if from_cache else "compilations/compiled")
        self.add("compilation_seconds", seconds)

    def report(self, gauges: Callable[[], dict[str, float]]) -> float | None:
        """Send a report, unless nothing has changed or the last one is younger than `REPORT_SECONDS`.

        Returns in how many seconds the next report is due; None if nothing has changed.
        """
        if not self._has_news:
            return None
        left = self._reported_at + REPORT_SECONDS - time.monotonic()
        if left > 0:
            return left
        with self._lock:
            self._has_news, counters = False, dict(self._counters)
        self._reported_at = time.monotonic()
        self._send(messages.Measured(counters, gauges()))
        return None
