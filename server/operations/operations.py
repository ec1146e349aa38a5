"""Accepted operations, from their submits to their answers.

`accept` writes an operation into the ledger before anything else happens to it. A second submit with the
same natural key finds the first one. An answer is written as the engine encoded it, before anybody sees it.
Polls wait for an event and are answered from memory; older answers come from the ledger.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Coroutine, Iterable
from functools import partial
from typing import Any, Literal, TypeVar

from sqlalchemy import Connection, Row
from sqlalchemy.exc import SQLAlchemyError

from ...engine import logs, messages
from ..errors import ApiError, BadRequest
from ..events import Event, EventByKind
from ..files import Disk
from ..ledger import operations as rows
from ..ledger import retention, step_metrics
from ..ledger.ledger import Ledger
from ..ledger.payloads import PayloadLost, Stored
from ..supervision.engine_process import Lane
from ..supervision.supervisor import Supervisor
from .answers import KEPT, settle, used
from .metrics import OperationMetrics
from .operation import (
    Answer,
    Dispatcher,
    KnownOperations,
    Operation,
    SampleDrawer,
    Submission,
)
from .payloads import Payloads

log = logging.getLogger("tinsmith.operations")

T = TypeVar("T")

_CANCELLED = "cancelled"
_PIECE_BYTES = 512  # of the objects of a tensor or a sequence in an answer, beside its numbers
_TRAINED = (messages.ForwardBackwardOutput, messages.OptimStepOutput)


class Operations:
    """All operations of the server.

    `dispatcher` puts the operations of each model in order; `drawer` may draw samples in the engine's place.
    Events: `finished(operation)` when an operation has its answer, `weights_missing(sample, why)` for a
    sample whose weights the engine does not have.
    """

    def __init__(
        self,
        ledger: Ledger,
        engine: Supervisor,
        disk: Disk,
        payloads: Payloads,
        dispatcher: Dispatcher,
        metrics: OperationMetrics,
        drawer: SampleDrawer | None = None,
    ):
        self._ledger = ledger
        self._engine = engine
        self._outbox = engine.outbox
        self._disk = disk
        self._payloads = payloads
        self._dispatcher = dispatcher
        self._drawer = drawer
        self._metrics = metrics
        self.finished: EventByKind[Operation] = EventByKind()
        self.weights_missing: Event[[Operation, str]] = Event()
        self.known = KnownOperations()
        """Those in memory."""
        self._tasks: set[asyncio.Task] = set()
        self.accepted = 0  # since the start
        self.stopped = False  # polls are not to wait any more
        engine.answered.subscribe(self.on_answer)
        dispatcher.gave_up.subscribe(self._give_up)

    # --- submits

    async def accept(self, submission: Submission) -> Operation:
        """Accept a submission; return its operation: a new one, or the first one with its natural key.

        Raises BadRequest if that first one was refused, or the turn of its number is over; Unavailable at a
        stop, or if the engine does not start; StorageFull if there is no room for a new one.
        """
        if self._engine.may_refuse_submits:
            self._engine.require_submits()
        # Shielded: a client that hangs up between the commit and the dispatch must not lose the operation.
        return await asyncio.shield(self._begin(self._accept(submission)))

    def _begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a task that `settle` waits for."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _accept(self, submission: Submission) -> Operation:
        request_id = f"req_{uuid.uuid4().hex}"
        logs.add_ids(operation_id=request_id)
        payload = None if submission.message is None else messages.encode(submission.message(request_id))
        operation = Operation(
            request_id,
            submission.owner,
            submission.kind,
            submission.model_id,
            submission.seq_id,
            submission.reply,
            0 if payload is None else len(payload),
            natural_key=submission.natural_key,
            session_id=submission.session_id,
            dialect=submission.dialect,
        )
        self.known.add(operation)
        stored: Stored | None = None
        try:
            if payload is not None:
                stream, inline = operation.model_id or operation.kind, operation.kind in KEPT
                is_new = partial(self._is_new, submission.natural_key)
                stored = await self._payloads.store(stream, request_id, payload, inline, is_new)
                del payload
            is_past = bool(operation.seq_id) and (
                operation.seq_id < self._dispatcher.sequences[operation.model_id].next_seq
            )
            result = await self._ledger.write(self._write, operation, submission, stored, is_past)
        except BaseException:
            self.known.discard(operation)
            self._payloads.forget(request_id)
            if stored is not None:
                await self._payloads.settled(stored, is_committed=False)
            raise
        if stored is not None and stored.file is not None:
            await self._payloads.settled(stored, is_committed=result is None)
        if isinstance(result, Answer):
            operation.answer = result
            self.known.answered(operation, len(messages.encode(result)))
        elif result is not None:
            self.known.discard(operation)
            self._payloads.forget(request_id)
            return self._first(result)
        operation.committed = True
        self.accepted += 1
        if operation.seq_id:
            self._dispatcher.add(operation)
        elif not operation.settled:
            self.send(operation)
        return operation

    def _is_new(self, natural_key: str | None) -> bool:
        """Return whether no operation has this key. Raises StorageFull for a new one without room."""
        if natural_key is not None and self._ledger.read_now(rows.find_by_natural_key, natural_key):
            return False
        self._disk.require_room()
        return True

    def _write(
        self,
        connection: Connection,
        operation: Operation,
        submission: Submission,
        stored: Stored | None,
        is_past: bool,
    ) -> Row | Answer | None:
        """Write a new operation; return its answer, if that is known, or the first one of its natural key."""
        if submission.natural_key is not None:
            first = rows.find_by_natural_key(connection, submission.natural_key)
            if first is not None:
                return first
        if is_past:
            raise BadRequest(f"seq_id {operation.seq_id} of this model had its turn; use a new number")
        if time.monotonic() > self._disk.has_room_until:
            self._disk.require_room()
        answer = submission.also(connection, operation.request_id) if submission.also else None
        state = "accepted" if answer is None else "done" if isinstance(answer, messages.Done) else "failed"
        rows.add(
            connection,
            {
                "id": operation.request_id,
                "owner": operation.owner,
                "natural_key": submission.natural_key,
                "kind": operation.kind,
                "model_id": operation.model_id or None,
                "seq_id": operation.seq_id or None,
                "session_id": submission.session_id,
                "sampler_id": submission.sampler_id,
                "sample_number": submission.sample_number,
                "reply": operation.reply,
                "dialect": operation.dialect,
                "state": state,
                "answer": None if answer is None else messages.encode(answer),
            },
            stored if answer is None else None,
        )
        return answer

    def _first(self, row: Row) -> Operation:
        operation = self.load(row)
        if operation.rejected and operation.answer is not None:
            assert isinstance(operation.answer, messages.Failed)
            raise BadRequest(operation.answer.message)
        return operation

    # --- sending

    def send(self, operation: Operation) -> None:
        """Send the operation to the engine, or, if it is a sample, to the drawer."""
        if operation.cancelled:
            self.fail([operation], _CANCELLED)
        elif operation.kind != "sample":
            self.send_to_engine(operation)
        elif (payload := operation.changed or self._payloads.remembered(operation.request_id)) is not None:
            self._send_sample(operation, payload)
        else:
            self._begin(self._load_and_send(operation))

    def _send_sample(self, operation: Operation, payload: bytes) -> None:
        if self._drawer is None or not self._drawer.take(operation, _sample(payload), self):
            self.send_to_engine(operation)

    async def _load_and_send(self, operation: Operation) -> None:
        payload = await self._load(operation)
        if payload is not None and not operation.answering:
            self._send_sample(operation, payload)

    async def _load(self, operation: Operation) -> bytes | None:
        """Return the operation's message to the engine; fail the operation and return None if it is lost."""
        while True:
            try:
                payload = operation.changed or await self._payloads.load(operation.request_id)
                if payload is not None:
                    return payload
                why = "its payload is gone"
            except PayloadLost as error:
                why = error.message
            except (ApiError, SQLAlchemyError, OSError) as error:
                log.error("a payload cannot be read yet: %s", error)
                await asyncio.sleep(1)
                continue
            self.fail([operation], f"the operation cannot be run: {why}", "server")
            return None

    async def message(self, operation: Operation) -> messages.ToEngine | None:
        """Return the operation's message to the engine, or None if its payload is not kept.

        Raises ApiError, SQLAlchemyError or OSError.
        """
        payload = operation.changed or await self._payloads.load(operation.request_id)
        return None if payload is None else messages.decode_to_engine(payload)

    def send_to_engine(self, operation: Operation, behind: str | None = None) -> None:
        """Send the operation to the engine, once in each life of it; without an engine it waits for the next.

        It waits behind the operations of the model `behind`, or of its own model, or with its owner's others.
        """
        assert operation.payload_bytes
        model_id = behind or operation.model_id
        lane = Lane(model_id) if model_id else Lane(owner=f"{operation.kind} of {operation.owner}")
        if operation.sent_in != self._outbox.life and self._outbox.put(
            lane, operation.request_id, operation.payload_bytes, operation.changed
        ):
            operation.sent_in = self._outbox.life

    def cancel(self, sample: Operation) -> None:
        """Answer that the sample was cancelled, unless it has an answer."""
        if sample.answering or sample.settled:
            return
        sample.cancelled = True
        if self._drawer is not None and self._drawer.cancel(sample):
            self.fail([sample], _CANCELLED)
            return
        cancel = messages.Cancel(f"cancel-{uuid.uuid4().hex}", sample.request_id)
        if self._outbox.withdraw(sample.request_id) or not self._outbox.put_own(messages.encode(cancel)):
            self.fail([sample], _CANCELLED)

    def unanswered(self, model_id: str | None = None) -> list[Operation]:
        """Return the accepted operations without an answer, of a model or of all, oldest first."""
        known = self.known
        found = known.waiting.values() if model_id is None else known.waiting_of(model_id)
        return [each for each in found if each.committed and not each.answering]

    # --- answers

    def on_answer(self, answer: Answer, encoded: bytes | None = None, ran: bool = True) -> None:
        """Record the answer to an operation; `encoded` is the engine's message, if it came from there.

        Answers to replays of finished operations are dropped. `ran` is False for an operation that has failed
        before any engine began it.
        """
        operation = self.known.waiting.get(answer.request_id)
        if operation is None or operation.answering:
            self._outbox.answered(answer.request_id)
            return
        if isinstance(answer, messages.Failed) and answer.category == "missing":
            if not operation.cancelled:
                self._outbox.answered(answer.request_id)
                self.weights_missing(operation, answer.message)
                return
            answer, encoded = messages.Failed(answer.request_id, _CANCELLED, "user"), None
        operation.answering = True
        self._begin(self._finish(operation, answer, ran, encoded))

    async def _finish(self, operation: Operation, answer: Answer, ran: bool, encoded: bytes | None) -> None:
        sample: messages.Sample | None = None
        if operation.kind == "sample" and isinstance(answer, messages.Done):
            payload = await self._load(operation)
            if payload is None:
                answer = messages.Failed(operation.request_id, "the sample's payload is lost", "server")
                encoded = None
            else:
                sample = _sample(payload)
        encoded = encoded or messages.encode(answer)
        output = answer.output if isinstance(answer, messages.Done) else None
        pieces = 0
        if isinstance(output, messages.ForwardBackwardOutput):
            pieces = len(output.logprobs) + len(output.elementwise_loss or ())
            operation.used = {"trained": sum([tensor.shape[0] for tensor in output.logprobs])}
        elif output is not None:
            pieces = len(getattr(output, "sequences", ()))
            operation.used = used(operation, output, sample)
        while True:
            try:
                if isinstance(output, _TRAINED):
                    key = (operation.request_id, operation.kind, operation.model_id, operation.seq_id)
                    await self._ledger.write(
                        rows.finish,
                        *key,
                        "done",
                        encoded,
                        answer.device_seconds,
                        operation.used,
                        output.metrics,
                    )
                else:
                    await self._ledger.write(_finish, operation, answer, encoded, ran, sample)
                break
            except ApiError as error:
                log.error(
                    "the answer of %s is kept in memory until it can be written: %s", operation.kind, error
                )
                await asyncio.sleep(1)
        operation.answer = answer
        self._payloads.forget(operation.request_id)
        self._outbox.answered(operation.request_id)
        metrics, kind = self._metrics, operation.kind
        tenant_class = metrics.quotas[operation.owner].tenant_class
        metrics.operations.labels(kind, "failed" if output is None else "done", tenant_class).inc()
        waited = time.monotonic() - operation.accepted_at - answer.device_seconds
        metrics.wait.labels(kind).observe(max(0.0, waited))
        metrics.device.labels(kind).observe(answer.device_seconds)
        for what, count in operation.used.items():
            metrics.tokens.labels(what).inc(count)
        for listener in self.finished[kind]:
            listener(operation)
        self.known.answered(operation, len(encoded) + _PIECE_BYTES * pieces)
        if operation.seq_id % step_metrics.THIN_EVERY == 0 and isinstance(output, _TRAINED):
            with contextlib.suppress(ApiError):  # they are thinned next time
                await self._ledger.write(step_metrics.thin, operation.model_id)

    def fail(
        self,
        operations: Iterable[Operation],
        message: str,
        category: Literal["user", "server"] = "user",
        ran: bool = False,
    ) -> None:
        """Answer operations with an error; `ran`: an engine has begun them, so a replay has to count them."""
        for operation in operations:
            self.on_answer(messages.Failed(operation.request_id, message, category), ran=ran)

    def _give_up(self, operations: list[Operation], missing: int) -> None:
        seconds = self._dispatcher.gap_grace_seconds
        self.fail(
            operations,
            f"seq_id {missing} of this model never arrived within {seconds:.0f} s; "
            "the operations sent after it were not run",
        )

    # --- polls

    async def find(self, owner: str, request_id: str) -> Operation | None:
        """Return the owner's operation of that id; None if there is none, or its answer was dropped."""
        operation = self.known.get(request_id)
        if operation is None:
            row = await self._ledger.read(rows.find, request_id)
            if row is None:
                return None
            operation = self.load(row)
        return operation if operation.owner == owner and not operation.expired else None

    async def parts(self, operation: Operation) -> list[Operation]:
        """Return the operations whose answers together are this one's; without those that were dropped.

        Only samples of several prompts have parts; any other operation is its own part.
        """
        if "parts" not in operation.reply:
            return [operation]
        found = [await self.find(operation.owner, each) for each in operation.reply["parts"]]
        return [part for part in found if part is not None] or [operation]

    async def has_expired(self, owner: str, request_id: str) -> bool:
        """Return whether this was the owner's operation, and its answer was dropped."""
        row = await self._ledger.read(rows.find, request_id)
        return row is not None and row.owner == owner

    def newest_answered(self, owner: str, most: int) -> dict[str, int]:
        """Return the owner's most recently active models, `most` of them, each with its newest `seq_id` that
        was answered, as far as that is in memory."""
        return self.known.newest_answered(owner, most)

    async def forget_answers(self, owner: str, through: float) -> int:
        """Drop the answers that the owner's operations got up to the time `through`; return how many."""
        dropped = 0
        while some := await self._ledger.write(retention.drop_answers, through, owner):
            dropped += some
        self.known.forget_answered(owner)
        return dropped

    def wake_all(self) -> None:
        """Stop: let every poll answer that its operation is still pending."""
        self.stopped = True
        for operation in self.known.waiting.values():
            operation.finished.set()

    def load(self, row: Row) -> Operation:
        """Return the operation of a row; if it is in memory already, the same object."""
        known = self.known.get(row.id)
        if known is not None:
            return known
        operation = Operation(
            row.id,
            row.owner,
            row.kind,
            row.model_id or "",
            row.seq_id or 0,
            row.reply,
            row.size or 0,
            natural_key=row.natural_key,
            session_id=row.session_id,
            rejected=row.state == "rejected",
            committed=True,
            dialect=row.dialect,
        )
        if row.answer is not None:
            answer = messages.decode_from_engine(row.answer)
            assert isinstance(answer, messages.Done | messages.Failed)
            operation.answer = answer
            operation.finished.set()
        elif row.state == "accepted":
            self.known.add(operation)
        else:
            operation.expired = True
            operation.finished.set()
        return operation

    async def written(self) -> None:
        """Wait until the answers received so far are written."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def settle(self) -> None:
        """Wait until there is no answer left to write."""
        while self._tasks:
            await self.written()


def _finish(
    connection: Connection,
    operation: Operation,
    answer: Answer,
    encoded: bytes,
    ran: bool,
    sample: messages.Sample | None,
) -> None:
    """Write an answer to the ledger; the operation's first answer also takes effect (`settle`)."""
    state = "done" if isinstance(answer, messages.Done) else "failed"
    key = (operation.request_id, operation.kind, operation.model_id, operation.seq_id)
    if rows.finish(connection, *key, state, encoded, answer.device_seconds):
        settle(connection, operation, answer, ran, sample)


def _sample(payload: bytes) -> messages.Sample:
    sample = messages.decode_to_engine(payload)
    assert isinstance(sample, messages.Sample)
    return sample
