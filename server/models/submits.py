"""Submits: operations of models, and samples, from a router to the ledger; and who is admitted.

A submit is checked, finds its place in the tenant's quota, gets its number in the model's sequence, and is
accepted. When a submit is refused for good, its number is used up, so that the operations after it can run.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
from sqlalchemy import Connection

from ...engine import messages
from ..access import Quotas
from ..dialect import Dialect
from ..errors import ApiError, BadRequest, QuotaExceeded, StorageQuotaExceeded, TooManyRequests
from ..ledger import operations as rows
from ..ledger.ledger import Ledger
from ..ledger.operations import SAMPLE, SampleNumber
from ..operations.answers import REPLAYED
from ..operations.operation import Dispatcher, Operation, Submission, natural_key
from ..operations.operations import Operations
from ..operations.sample_streams import SampleStreams
from .run import Run
from .runs import Runs

log = logging.getLogger("tinsmith.admission")

BURST_SECONDS = 10.0
"""A tenant that was quiet for so long may send that much of its rate at once."""
_PAUSED_SECONDS = 30.0  # how long polls tell of a 429: a poll waits nearly as long
_MODELS_NAMED = 5


@dataclass
class _Bucket:
    """The state of a rate limit that allows bursts (Turner's token bucket). It is full at first."""

    used: float = 0.0  # tokens
    at: float = 0.0  # of the clock


@dataclass
class _Queue:
    """One tenant's operations that are accepted and not answered, or about to be accepted."""

    accepted: set[Operation] = field(default_factory=set)
    arriving: int = 0
    bytes: int = 0  # of the payloads of `accepted`


class Queues(dict[str, _Queue]):
    """The unanswered operations of some kind, by tenant, and their places.

    `quota`: the field of `Quota` that limits them. `what`: their name for people.
    `refuse(tenant, reason)` returns the error for an operation that has no place.
    """

    def __init__(self, quotas: Quotas, quota: str, what: str, refuse: Callable[[str, str], TooManyRequests]):
        super().__init__()
        self._quotas = quotas
        self._quota = quota
        self._what = what
        self._refuse = refuse

    def enter(self, tenant: str) -> None:
        """Keep a place for an operation that is about to be accepted, until `leave`. Raises
        TooManyRequests."""
        quota, queue = self._quotas[tenant], self.get(tenant) or _Queue()
        limit = getattr(quota, self._quota)
        if queue.bytes >= quota.queued_bytes:
            raise self._refuse(
                tenant,
                f"the requests of this key's tenant that wait for their answers have {queue.bytes} bytes, "
                f"its quota is {quota.queued_bytes}; send more when some have come back",
            )
        if len(queue.accepted) + queue.arriving >= limit:
            raise self._refuse(tenant, f"{limit} {self._what}")
        queue.arriving += 1
        self[tenant] = queue

    def leave(self, tenant: str, operation: Operation | None) -> None:
        """Give the place to the operation, if it was accepted, until its answer."""
        queue = self[tenant]
        queue.arriving -= 1
        if operation is not None and operation.answer is None and not operation.expired:
            if operation not in queue.accepted:
                queue.accepted.add(operation)
                queue.bytes += operation.payload_bytes
        elif not queue.arriving and not queue.accepted:
            del self[tenant]

    def add(self, operation: Operation) -> None:
        """Count an operation that was accepted before the start."""
        self.setdefault(operation.owner, _Queue()).arriving += 1
        self.leave(operation.owner, operation)


class Admission:
    """Lets in requests, operations, samples and models, up to the quotas of their tenants, so that no tenant
    keeps out the others.

    What is refused for the moment gets 429, which clients send again; meanwhile the tenant's polls say why
    (`paused`). What waiting does not change is refused for good.
    """

    def __init__(self, quotas: Quotas, clock: Callable[[], float] = time.monotonic):
        self._quotas = quotas
        self._clock = clock
        what = "operations of this key's tenant are queued, which is its quota; send more when some are done"
        self.operations = Queues(quotas, "queued_operations", what, self.refuse)
        self.early = Queues(quotas, "queued_operations", what, self.refuse)
        """Operations that come before their turn: they do not take the places of those that they wait for."""
        self.samples = Queues(
            quotas,
            "waiting_samples",
            "samples of this key's tenant are waiting for their answers, which is its quota; "
            "send more when some have come back",
            self.refuse,
        )
        self._creating: Counter[str] = Counter()
        self._buckets: defaultdict[str, _Bucket] = defaultdict(_Bucket)
        self._refused: dict[str, tuple[float, str]] = {}  # by tenant: when its last 429 was, and why

    def take_up(self, unanswered: Iterable[Operation]) -> None:
        """Count the operations from before the start."""
        for operation in unanswered:
            (self.samples if operation.kind == SAMPLE else self.operations).add(operation)

    def answered(self, operation: Operation) -> None:
        """Give the operation's place to another one."""
        tenant = operation.owner
        for queues in (self.samples, self.operations, self.early):
            if tenant in queues and operation in (queue := queues[tenant]).accepted:
                queue.accepted.discard(operation)
                queue.bytes -= operation.payload_bytes
                if not (queue.accepted or queue.arriving):
                    del queues[tenant]

    def paused(self, tenant: str) -> str | None:
        """Return why the tenant was told to wait, if that was just now."""
        at, reason = self._refused.get(tenant, (0.0, ""))
        return reason if reason and self._clock() - at < _PAUSED_SECONDS else None

    def refuse(self, tenant: str, reason: str, seconds: float = 1.0) -> TooManyRequests:
        """Return the error for what the tenant may send again after so long, and remember the reason."""
        if self.paused(tenant) is None:
            log.info("tenant %s is told to wait: %s", tenant, reason)
        self._refused[tenant] = (self._clock(), reason)
        return TooManyRequests(reason, seconds)

    def request(self, tenant: str) -> None:
        """Let in a request of any kind. Raises TooManyRequests over the tenant's rate.

        Each request takes a token. A tenant's bucket holds `BURST_SECONDS` of its rate, but at least one
        token, and tokens come back at that rate.
        """
        rate, bucket, now = self._quotas[tenant].requests_per_second, self._buckets[tenant], self._clock()
        bucket.used, bucket.at = max(0.0, bucket.used - rate * (now - bucket.at)), now
        over = bucket.used + 1 - max(1.0, rate * BURST_SECONDS)
        if over > 0:
            reason = f"this key's tenant may send {rate:g} requests a second; it sends more"
            raise self.refuse(tenant, reason, over / rate)
        bucket.used += 1

    @contextmanager
    def model(self, tenant: str, model_id: str, alive: list[Run]) -> Iterator[None]:
        """Let in a new model, or one that is among those alive. Raises QuotaExceeded."""
        limit = self._quotas[tenant].models
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
        limit = self._quotas[tenant].models
        if len(alive) >= limit:
            raise self.refuse(
                tenant,
                f"this model had left the engine, and {len(alive)} others of this key's tenant are alive, "
                f"which is its quota: {_named(alive)}; it comes back when one of them leaves",
                5.0,
            )


def _named(runs: list[Run]) -> str:
    """Name the runs that were used longest ago, by id, which begins with the session's."""
    now = time.monotonic()
    oldest = sorted(runs, key=lambda run: run.used_at)[:_MODELS_NAMED]
    shown = ", ".join(f"{run.id} (used {now - run.used_at:.0f} s ago)" for run in oldest)
    more = len(runs) - _MODELS_NAMED
    return f"{shown} and {more} more" if more > 0 else shown


class UnusedNumbers:
    """Uses up numbers of operations that will not be run.

    `numbered` tells which operation of which model a client's number means, and raises ApiError for a
    model that is not the client's own.
    """

    def __init__(
        self,
        ledger: Ledger,
        dispatcher: Dispatcher,
        numbered: Callable[[str, str, int], Awaitable[tuple[str, int]]],
    ):
        self._ledger = ledger
        self._dispatcher = dispatcher
        self._numbered = numbered

    async def consume(self, owner: str, model_id: Any, seq_id: Any, message: str) -> None:
        """Use up the number of a submit that was refused, so that the operations after it run."""
        is_number = isinstance(seq_id, int) and not isinstance(seq_id, bool)
        if not isinstance(model_id, str) or not is_number or not 0 < seq_id < 1 << 61:
            return
        try:
            model_id, seq_id = await self._numbered(owner, model_id, seq_id)
        except ApiError:
            return
        await self.give_up(owner, model_id, seq_id, message)

    async def give_up(self, owner: str, model_id: str, seq_id: int, message: str) -> None:
        """Use up a number that has not had its turn: answer its operation with an error."""
        if seq_id < self._dispatcher.next_seq(model_id):
            return
        request_id = f"req_{uuid.uuid4().hex}"
        failure = messages.Failed(request_id, message, "user")
        operation = Operation(
            request_id, owner, "refused", model_id, seq_id, {}, answer=failure, rejected=True
        )

        def change(connection: Connection) -> bool:
            key = natural_key(model_id, seq_id)
            if rows.find_by_natural_key(connection, key) is not None:
                return False
            row: dict[str, Any] = {
                "id": request_id,
                "owner": owner,
                "natural_key": key,
                "kind": operation.kind,
                "reply": {},
            }
            row |= {"model_id": model_id, "seq_id": seq_id}
            rows.add(connection, row | {"state": "rejected", "answer": messages.encode(failure)})
            return True

        if await self._ledger.write(change):
            operation.finished.set()
            self._dispatcher.add(operation)


class RefusedSaves:
    """Uses up the numbers of saves that were refused for want of room, once nobody sends them again.

    A client sends such a save again for some minutes and then gives it up, and the operations after it
    would wait for its number. A save changes no model, so they can run without it.
    """

    def __init__(self, unused: UnusedNumbers, patience_seconds: float):
        self._unused = unused
        self._patience_seconds = patience_seconds
        self._timers: dict[tuple[str, int], asyncio.TimerHandle] = {}
        self._consuming: set[asyncio.Task[None]] = set()

    def refused(self, owner: str, model_id: str, seq_id: int, message: str) -> None:
        """Note that a save was refused, for the first time or again."""
        known = self._timers.pop((model_id, seq_id), None)
        if known is not None:
            known.cancel()
        self._timers[model_id, seq_id] = asyncio.get_running_loop().call_later(
            self._patience_seconds, self._give_up, owner, model_id, seq_id, message
        )

    def _give_up(self, owner: str, model_id: str, seq_id: int, message: str) -> None:
        del self._timers[model_id, seq_id]
        task = asyncio.ensure_future(self._use_up(owner, model_id, seq_id, message))
        self._consuming.add(task)
        task.add_done_callback(self._consuming.discard)

    async def _use_up(self, owner: str, model_id: str, seq_id: int, message: str) -> None:
        try:
            await self._unused.consume(owner, model_id, seq_id, message)
        except ApiError:  # the ledger cannot be written now
            self.refused(owner, model_id, seq_id, message)

    def close(self) -> None:
        for timer in self._timers.values():
            timer.cancel()


_TRAINING = REPLAYED - {"save_unnamed_sampler"}


class Submits:
    """Submits the operations of models, and uses up the numbers of those that are refused."""

    def __init__(
        self,
        runs: Runs,
        operations: Operations,
        dispatcher: Dispatcher,
        admission: Admission,
        unused: UnusedNumbers,
        refused_saves: RefusedSaves,
    ):
        self._runs = runs
        self._operations = operations
        self._dispatcher = dispatcher
        self._admission = admission
        self._unused = unused
        self._refused_saves = refused_saves

    async def submit(
        self,
        run: Run,
        kind: str,
        seq_id: int | None,
        message: messages.ToEngine,
        reply: dict[str, Any] | None = None,
        also: Any = None,
        key: str | None = None,
    ) -> Operation:
        """Submit an operation of a model; without a `seq_id` it comes after all that have arrived.

        `message` has no request id yet. Two operations without a `seq_id` but with the same `key` are
        one. Only the server itself uses a `key`: a model that it trains takes no other training.
        """
        if run.driven and key is None and (seq_id is not None or kind in _TRAINING):
            raise BadRequest(
                f"{kind}: the server trains this model (rlve_config); stop it with stop_rlve first. "
                "Saves that have no seq_id, and samples, are welcome meanwhile"
            )
        number = self._runs.reserve_seq(run) if seq_id is None else run.seq_base + seq_id
        try:
            if not run.resident and not self._runs.is_alive(run):
                self._admission.come_back(run.owner, self._runs.alive(run.owner))
            is_early = number > self._dispatcher.sequences[run.id].next_seq
            queues = self._admission.early if is_early else self._admission.operations
            queues.enter(run.owner)
            operation = None
            try:
                operation = await self._operations.accept(
                    Submission(
                        run.owner,
                        kind,
                        key if seq_id is None else natural_key(run.id, number),
                        lambda request_id: msgspec.structs.replace(message, request_id=request_id),
                        {"model_id": run.name} | (reply or {}),
                        run.id,
                        number,
                        also,
                        run.dialect,
                    )
                )
            finally:
                queues.leave(run.owner, operation)
        except ApiError as error:
            if seq_id is None:  # nobody will send this number again
                await self._unused.give_up(run.owner, run.id, number, error.message)
            raise
        if operation.seq_id != number:
            await self._unused.give_up(run.owner, run.id, number, f"{kind} was sent before")
        return operation

    @asynccontextmanager
    async def numbered(self, owner: str, model: Any, seq_id: Any) -> AsyncIterator[None]:
        """Refuse this number of a model's operations if what happens in this context raises ApiError."""
        try:
            yield
        except ApiError as error:
            await self.refuse(owner, model, seq_id, error)
            raise

    async def refuse(self, owner: str, model: Any, seq_id: Any, error: ApiError) -> None:
        """Use up the number of a submit that is wrong for good. One that lacks room may be sent again."""
        if error.final:
            await self._unused.consume(owner, model, seq_id, error.message)
        elif isinstance(error, StorageQuotaExceeded) and isinstance(seq_id, int):
            self._refused_saves.refused(owner, model, seq_id, error.message)


class SampleCheck(Protocol):
    """Knows which samples can be drawn."""

    def check(self, owner: str, sample: messages.Sample) -> None:
        """Raise BadRequest, naming the field, for a sample that will never be drawn."""


class SampleSubmits:
    """Submits samples: checked, admitted, accepted."""

    def __init__(
        self, operations: Operations, admission: Admission, streams: SampleStreams, checks: SampleCheck
    ):
        self._operations = operations
        self._admission = admission
        self._streams = streams
        self._checks = checks

    def check(self, owner: str, sample: messages.Sample) -> None:
        """Raise BadRequest for a sample that `submit` would refuse because of what it asks for."""
        self._checks.check(owner, sample)

    async def submit(
        self,
        owner: str,
        sample: messages.Sample,
        number: SampleNumber | None = None,
        reply: dict[str, Any] | None = None,
        dialect: Dialect = "tinker",
    ) -> Operation:
        """Accept a sample, which has no request id yet. Raises ApiError."""
        self._checks.check(owner, sample)
        opened: str | None = None

        def message(request_id: str) -> messages.Sample:
            nonlocal opened
            if sample.stream:
                self._streams.open(request_id, owner)
                opened = request_id
            return msgspec.structs.replace(sample, request_id=request_id)

        samples = self._admission.samples
        samples.enter(owner)
        operation: Operation | None = None
        try:
            operation = await self._operations.accept(
                Submission(
                    owner,
                    SAMPLE,
                    number.natural_key if number else None,
                    message,
                    reply or {},
                    dialect=dialect,
                    session_id=number.session_id if number else None,
                    sampler_id=number.sampler_id if number else None,
                    sample_number=number.number if number else None,
                )
            )
        except ApiError:
            if opened is not None:
                self._streams.close(opened)
            raise
        finally:
            samples.leave(owner, operation)
        return operation

    def cancel(self, operation: Operation) -> None:
        """Stop drawing a sample that nobody waits for any more."""
        self._streams.close(operation.request_id)
        if operation.answer is None and not self._operations.stopped:
            self._operations.cancel(operation)
