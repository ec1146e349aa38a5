"""Whether a request of a tenant is taken now, so that a crowd of one does not keep out the others.

What passes by waiting is refused with 429, which clients send again; while it does, the tenant's polls say
why (`paused`). What does not pass by waiting is refused for good.

A rate limit that allows bursts (Turner's token bucket).
"""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

from ..access.quotas import Quotas
from ..errors import QuotaExceeded, TooManyRequests
from ..operations.operation import Operation
from .run import Run


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


log = logging.getLogger("tinsmith.admission")

BURST_SECONDS = 10.0
"""A tenant that was quiet for so long may send that much of its rate at once."""
_PAUSED_SECONDS = 30.0  # for so long after a 429 polls tell of it: a poll waits nearly as long
_MODELS_NAMED = 5


Arriving = AbstractContextManager[Callable[[Operation], None]]


class Waiting:
    """The operations of each tenant that are accepted, or about to be, and not answered."""

    def __init__(self) -> None:
        self._accepted: dict[str, set[Operation]] = {}
        self._bytes: Counter[str] = Counter()  # of their payloads, by tenant
        self._arriving: Counter[str] = Counter()

    def reaches(self, limit: int, tenant: str) -> bool:
        return len(self._accepted.get(tenant, ())) + self._arriving[tenant] >= limit

    def bytes_of(self, tenant: str) -> int:
        return self._bytes[tenant]

    @contextmanager
    def arriving(self, tenant: str) -> Iterator[Callable[[Operation], None]]:
        """Keeps a place until the operation is known: `with ... as accepted: accepted(operation)`."""
        self._arriving[tenant] += 1
        try:
            yield self.add
        finally:
            self._arriving[tenant] -= 1
            if not self._arriving[tenant]:
                del self._arriving[tenant]

    def add(self, operation: Operation) -> None:
        """It was accepted, now or before."""
        waiting = self._accepted.setdefault(operation.owner, set())
        if not operation.settled and operation not in waiting:
            waiting.add(operation)
            self._bytes[operation.owner] += operation.payload_bytes
        self._drop_empty(operation.owner)

    def discard(self, operation: Operation) -> None:
        """It was answered. Does nothing if it did not wait here."""
        waiting = self._accepted.get(operation.owner)
        if waiting is not None and operation in waiting:
            waiting.discard(operation)
            self._bytes[operation.owner] -= operation.payload_bytes
            self._drop_empty(operation.owner)

    def _drop_empty(self, tenant: str) -> None:
        if not self._accepted[tenant]:
            del self._accepted[tenant]
            del self._bytes[tenant]


class Admission:
    def __init__(self, quotas: Quotas, clock: Callable[[], float] = time.monotonic):
        self._quotas = quotas
        self._clock = clock
        self._samples = Waiting()
        self._operations = Waiting()
        # Operations that come before their turn do not take the places of those that they wait for.
        self._early = Waiting()
        self._creating: Counter[str] = Counter()
        self._buckets: defaultdict[str, TokenBucket] = defaultdict(TokenBucket)
        self._refused: dict[str, tuple[float, str]] = {}  # when a tenant was last told to wait, and why

    def take_up(self, unanswered: Iterable[Operation]) -> None:
        """Those of before the start."""
        for operation in unanswered:
            (self._samples if operation.kind == "sample" else self._operations).add(operation)

    def answered(self, operation: Operation) -> None:
        """The operation leaves its place to another one."""
        for waiting in (self._samples, self._operations, self._early):
            waiting.discard(operation)

    def paused(self, tenant: str) -> str | None:
        """Why the tenant was told to wait, if it was just now."""
        at, reason = self._refused.get(tenant, (0.0, ""))
        return reason if reason and self._clock() - at < _PAUSED_SECONDS else None

    def _wait(self, tenant: str, reason: str, seconds: float = 1.0) -> TooManyRequests:
        if self.paused(tenant) is None:
            log.info("tenant %s is told to wait: %s", tenant, reason)
        self._refused[tenant] = (self._clock(), reason)
        return TooManyRequests(reason, seconds)

    def request(self, tenant: str) -> None:
        """Any request. Raises TooManyRequests over the tenant's rate."""
        rate = self._quotas.of(tenant).requests_per_second
        wait = self._buckets[tenant].take(rate, BURST_SECONDS, self._clock())
        if wait:
            raise self._wait(
                tenant, f"this key's tenant may send {rate:g} requests a second; it sends more", wait
            )

    def sample(self, tenant: str) -> Arriving:
        """As `Waiting.arriving`. Raises TooManyRequests."""
        limit = self._quotas.of(tenant).waiting_samples
        self._require_bytes(self._samples, tenant)
        if self._samples.reaches(limit, tenant):
            raise self._wait(
                tenant,
                f"{limit} samples of this key's tenant are waiting for their answers, which is its quota; "
                "send more when some have come back",
            )
        return self._samples.arriving(tenant)

    def operation(self, tenant: str, early: bool) -> Arriving:
        """A training operation, `early` if others come before it. As `Waiting.arriving`. Raises
        TooManyRequests."""
        waiting = self._early if early else self._operations
        limit = self._quotas.of(tenant).queued_operations
        self._require_bytes(waiting, tenant)
        if waiting.reaches(limit, tenant):
            raise self._wait(
                tenant,
                f"{limit} operations of this key's tenant are queued, which is its quota; "
                "send more when some are done",
            )
        return waiting.arriving(tenant)

    def _require_bytes(self, waiting: Waiting, tenant: str) -> None:
        """Raises TooManyRequests."""
        limit, held = self._quotas.of(tenant).queued_bytes, waiting.bytes_of(tenant)
        if held >= limit:
            raise self._wait(
                tenant,
                f"the requests of this key's tenant that wait for their answers have {held} bytes, its quota "
                f"is {limit}; send more when some have come back",
            )

    @contextmanager
    def model(self, tenant: str, model_id: str, alive: list[Run]) -> Iterator[None]:
        """A new model; one that is among those alive is an old one. Raises QuotaExceeded."""
        limit = self._quotas.of(tenant).models
        known = any(run.id == model_id for run in alive)
        if not known and len(alive) + self._creating[tenant] >= limit:
            raise QuotaExceeded(
                f"this key's tenant has {len(alive)} models alive, its quota is {limit}: {_named(alive)}. "
                "Save what is needed and end the session of one (ServiceClient.close, or "
                "POST /api/v1/sessions/<session>/finish); models of silent sessions leave by themselves"
            )
        self._creating[tenant] += 1
        try:
            yield
        finally:
            self._creating[tenant] -= 1
            if not self._creating[tenant]:
                del self._creating[tenant]

    def come_back(self, tenant: str, alive: list[Run]) -> None:
        """A model that left the engine is needed again. Raises TooManyRequests."""
        limit = self._quotas.of(tenant).models
        if len(alive) >= limit:
            raise self._wait(
                tenant,
                f"this model had left the engine, and {len(alive)} others of this key's tenant are alive, "
                f"which is its quota: {_named(alive)}; it comes back when one of them leaves",
                5.0,
            )


def _named(runs: list[Run]) -> str:
    """By id, which begins with the session's; those that were used last come last."""
    now = time.monotonic()
    oldest = sorted(runs, key=lambda run: run.used_at)[:_MODELS_NAMED]
    shown = ", ".join(f"{run.id} (used {now - run.used_at:.0f} s ago)" for run in oldest)
    more = len(runs) - _MODELS_NAMED
    return f"{shown} and {more} more" if more > 0 else shown
