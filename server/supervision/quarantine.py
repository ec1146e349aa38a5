"""Operations that engines died of.

What the engine computed when it died is suspect: a model, or a sample. After the restart the suspects run one
after the other, never two at once, beside everything that is not suspect. So an operation that ends every
engine is found, and what only happened to run beside it is not mistaken for it. An operation in whose turn
`deaths` engines ended within `window_seconds` is given up.
"""

from __future__ import annotations

import time
from collections.abc import Callable

Suspect = tuple[str, str]  # a request id, and its model's or ''


class Quarantine:
    def __init__(self, deaths: int, window_seconds: float, clock: Callable[[], float] = time.monotonic):
        self._deaths = deaths
        self._window = window_seconds
        self._clock = clock
        self._died_at: dict[Suspect, list[float]] = {}

    def blame(self, under_way: list[Suspect]) -> list[Suspect]:
        """The engine died computing these. Those that are to be given up; they are no suspects any more."""
        now = self._clock()
        for suspect in under_way:
            self._died_at.setdefault(suspect, []).append(now)
        for suspect, times in list(self._died_at.items()):
            self._died_at[suspect] = [at for at in times if now - at < self._window]
            if not self._died_at[suspect]:
                del self._died_at[suspect]
        guilty = [suspect for suspect in under_way if len(self._died_at.get(suspect, ())) >= self._deaths]
        for suspect in guilty:
            del self._died_at[suspect]
        return guilty

    def subjects(self) -> list[str]:
        """Models and samples that are to run one after the other, those with the fewest deaths first."""
        deaths: dict[str, int] = {}
        for (request_id, model_id), times in self._died_at.items():
            subject = model_id or request_id
            deaths[subject] = max(deaths.get(subject, 0), len(times))
        return sorted(deaths, key=lambda subject: deaths[subject])

    def requests(self, subject: str) -> set[str]:
        """The request ids that a model or a sample is suspect for."""
        return {request_id for request_id, model_id in self._died_at if (model_id or request_id) == subject}

    def acquit(self, subject: str) -> None:
        """It ran, and the engine lives."""
        for suspect in [each for each in self._died_at if (each[1] or each[0]) == subject]:
            del self._died_at[suspect]
