"""Admission: decides whether a tenant's request is taken now, so that no tenant keeps out the others.

What is refused for the moment gets 429, which clients send again; meanwhile the tenant's polls say why
(`paused`). What waiting does not change is refused for good.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

from ..access import Quotas
from ..errors import QuotaExceeded, TooManyRequests
from ..operations.operation import Operation
from .run import Run

log = logging.getLogger("tinsmith.admission")

BURST_SECONDS = 10.0
"""A tenant that was quiet for so long may send that much of its rate at once."""
_PAUSED_SECONDS = 30.0  # how long polls tell of a 429: a poll waits nearly as long
_MODELS_NAMED = 5

Arriving = AbstractContextManager[Callable[[Operation], None]]
"""Keeps a place until the operation is known: `with ... as accepted: accepted(operation)`."""


class TokenBucket:
    """A rate limit that allows bursts (Turner's token bucket). It is full at first."""

    def __init__(self) -> None:
        self._used = 0.0
        self._at = 0.0

    def take(self, rate: float, burst_seconds: float, now: float) -> float:
        """Take a token and return 0; or take none and return the seconds until there is one.

        The bucket holds `rate * burst_seconds` tokens, but at least one, and tokens come back at `rate`.
        `now` is in seconds, of any clock that only goes forward.
        """
        self._used = max(0.0, self._used - rate * (now - self._at))
        self._at = now
        room = max(1.0, rate * burst_seconds)
        if self._used + 1 <= room:
            self._used += 1
            return 0.0
        return (self._used + 1 - room) / rate


@dataclass
class _Queue:
    """One tenant's operations that are accepted and not answered, or about to be accepted."""

    accepted: set[Operation] = field(default_factory=set)
    arriving: int = 0
    bytes: int = 0  # of the payloads of `accepted`


_Queues = defaultdict[str, _Queue]  # by tenant


class Admission:
    """Lets in requests, operations, samples and models, up to the quotas of their tenants."""

    def __init__(self, quotas: Quotas, clock: Callable[[], float] = time.monotonic):
        self._quotas = quotas
        self._clock = clock
        self._samples: _Queues = defaultdict(_Queue)
        self._operations: _Queues = defaultdict(_Queue)
        # Operations that come before their turn do not take the places of those that they wait for.
        self._early: _Queues = defaultdict(_Queue)
        self._creating: Counter[str] = Counter()
        self._buckets: defaultdict[str, TokenBucket] = defaultdict(TokenBucket)
        self._refused: dict[str, tuple[float, str]] = {}  # by tenant: when its last 429 was, and why

    def take_up(self, unanswered: Iterable[Operation]) -> None:
        """Count the operations from before the start."""
        for operation in unanswered:
            _add(self._samples if operation.kind == "sample" else self._operations, operation)

    def answered(self, operation: Operation) -> None:
        """Give the operation's place to another one."""
        tenant = operation.owner
        for queues in (self._samples, self._operations, self._early):
            if tenant in queues and operation in (queue := queues[tenant]).accepted:
                queue.accepted.discard(operation)
                queue.bytes -= operation.payload_bytes
                if not (queue.accepted or queue.arriving):
                    del queues[tenant]

    def paused(self, tenant: str) -> str | None:
        """Return why the tenant was told to wait, if that was just now."""
        at, reason = self._refused.get(tenant, (0.0, ""))
        return reason if reason and self._clock() - at < _PAUSED_SECONDS else None

    def _wait(self, tenant: str, reason: str, seconds: float = 1.0) -> TooManyRequests:
        if self.paused(tenant) is None:
            log.info("tenant %s is told to wait: %s", tenant, reason)
        self._refused[tenant] = (self._clock(), reason)
        return TooManyRequests(reason, seconds)

    def request(self, tenant: str) -> None:
        """Let in a request of any kind. Raises TooManyRequests over the tenant's rate."""
        rate = self._quotas.of(tenant).requests_per_second
        wait = self._buckets[tenant].take(rate, BURST_SECONDS, self._clock())
        if wait:
            raise self._wait(
                tenant, f"this key's tenant may send {rate:g} requests a second; it sends more", wait
            )

    def sample(self, tenant: str) -> Arriving:
        """Let in a sample. Raises TooManyRequests."""
        limit = self._quotas.of(tenant).waiting_samples
        return self._place(
            self._samples,
            tenant,
            limit,
            f"{limit} samples of this key's tenant are waiting for their answers, which is its quota; "
            "send more when some have come back",
        )

    def operation(self, tenant: str, early: bool) -> Arriving:
        """Let in a training operation, `early` if others come before it. Raises TooManyRequests."""
        limit = self._quotas.of(tenant).queued_operations
        return self._place(
            self._early if early else self._operations,
            tenant,
            limit,
            f"{limit} operations of this key's tenant are queued, which is its quota; "
            "send more when some are done",
        )

    def _place(self, queues: _Queues, tenant: str, limit: int, reason: str) -> Arriving:
        most = self._quotas.of(tenant).queued_bytes
        queue = queues[tenant] if tenant in queues else _Queue()
        if queue.bytes >= most:
            raise self._wait(
                tenant,
                f"the requests of this key's tenant that wait for their answers have {queue.bytes} bytes, "
                f"its quota is {most}; send more when some have come back",
            )
        if len(queue.accepted) + queue.arriving >= limit:
            raise self._wait(tenant, reason)
        return _arriving(queues, tenant)

    @contextmanager
    def model(self, tenant: str, model_id: str, alive: list[Run]) -> Iterator[None]:
        """Let in a new model, or one that is among those alive. Raises QuotaExceeded."""
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
        """Let in a model that left the engine and is needed again. Raises TooManyRequests."""
        limit = self._quotas.of(tenant).models
        if len(alive) >= limit:
            raise self._wait(
                tenant,
                f"this model had left the engine, and {len(alive)} others of this key's tenant are alive, "
                f"which is its quota: {_named(alive)}; it comes back when one of them leaves",
                5.0,
            )


@contextmanager
def _arriving(queues: _Queues, tenant: str) -> Iterator[Callable[[Operation], None]]:
    queues[tenant].arriving += 1
    try:
        yield lambda operation: _add(queues, operation)
    finally:
        queue = queues[tenant]
        queue.arriving -= 1
        if not (queue.accepted or queue.arriving):
            del queues[tenant]


def _add(queues: _Queues, operation: Operation) -> None:
    """Count an operation that was accepted, now or before."""
    queue = queues[operation.owner]
    if operation.answer is None and not operation.expired and operation not in queue.accepted:
        queue.accepted.add(operation)
        queue.bytes += operation.payload_bytes


def _named(runs: list[Run]) -> str:
    """Name the runs that were used longest ago, by id, which begins with the session's."""
    now = time.monotonic()
    oldest = sorted(runs, key=lambda run: run.used_at)[:_MODELS_NAMED]
    shown = ", ".join(f"{run.id} (used {now - run.used_at:.0f} s ago)" for run in oldest)
    more = len(runs) - _MODELS_NAMED
    return f"{shown} and {more} more" if more > 0 else shown
