"""How many samples a client may have waiting, so that a crowd of one does not keep out the others."""

from __future__ import annotations

from collections import defaultdict

from .errors import TooManyRequests
from .operation import Operation


class SampleAdmission:
    """Counts the samples of each owner that are accepted and not answered, up to `limit`."""

    def __init__(self, limit: int):
        self._limit = limit
        self._waiting: defaultdict[str, set[Operation]] = defaultdict(set)

    def check(self, owner: str) -> None:
        """Raises TooManyRequests for an owner with `limit` samples waiting."""
        waiting = self._waiting[owner]
        if len(waiting) >= self._limit:
            waiting -= {operation for operation in waiting if operation.settled}
        if len(waiting) >= self._limit:
            raise TooManyRequests(
                f"{len(waiting)} samples of this key are waiting for their answers, which is the limit; "
                "send more when some have come back"
            )

    def admit(self, operation: Operation) -> None:
        """It was accepted, now or before."""
        if not operation.settled:
            self._waiting[operation.owner].add(operation)
