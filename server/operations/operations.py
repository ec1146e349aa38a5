"""Accepted operations, from their submits to their answers.

`accept` writes an operation into the ledger before anything else happens to it. A second submit with the
same natural key finds the first one. An answer is written as the engine encoded it, before anybody sees it.
Polls wait for an event and are answered from memory; older answers come from the ledger.
"""

from __future__ import annotations

import asyncio
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
from ..ledger import retention
from ..ledger.ledger import Ledger
from ..ledger.payloads import PayloadLost, Stored
from ..supervision.outbox import Lane
from ..supervision.supervisor import Supervisor
from .answers import KEPT, RememberedAnswers, settle, used
from .dispatcher import Dispatcher
from .operation import Answer, Operation, SampleDrawer, Submission, stream_of
from .payloads import Payloads

log = logging.getLogger("tinsmith.operations")

T = TypeVar("T")

_CANCELLED = "cancelled"
_TRAINED = (messages.ForwardBackwardOutput, messages.OptimStepOutput)


class PendingOperations(dict[str, Operation]):
    """Operations without an answer, by id, oldest first, with an index by model."""

    def __init__(self) -> None:
        super().__init__()
        self._of_model: dict[str, dict[str, Operation]] = {}

    def add(self, operation: Operation) -> None:
        self[operation.request_id] = operation
        self._of_model.setdefault(operation.model_id, {})[operation.request_id] = operation

    def discard(self, request_id: str) -> None:
        operation = self.pop(request_id, None)
        if operation is not None:
            mine = self._of_model[operation.model_id]
            del mine[request_id]
            if not mine:
                del self._of_model[operation.model_id]

    def of_model(self, model_id: str) -> list[Operation]:
        """Return the model's operations, oldest first."""
        return list(self._of_model.get(model_id, {}).values())


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
        drawer: SampleDrawer | None = None,
    ):
        self._ledger = ledger
        self._engine = engine
        self._disk = disk
        self._payloads = payloads
        self._dispatcher = dispatcher
        self._drawer = drawer
        self.finished: EventByKind[Operation] = EventByKind()
        self.weights_missing: Event[[Operation, str]] = Event()
        self._pending = PendingOperations()
        self._remembered = RememberedAnswers()
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
        self._pending.add(operation)
        stored: Stored | None = None
        try:
            if payload is not None:
                stream, inline = stream_of(operation.model_id, operation.kind), operation.kind in KEPT
                is_new = partial(self._is_new, submission.natural_key)
                stored = await self._payloads.store(stream, request_id, payload, inline, is_new)
                del payload
            is_past = 0 < operation.seq_id < self._dispatcher.next_seq(operation.model_id)
            result = await self._ledger.write(self._write, operation, submission, stored, is_past)
        except BaseException:
            self._pending.discard(request_id)
            self._payloads.forget(request_id)
            if stored is not None:
                await self._payloads.settled(stored, is_committed=False)
            raise
        if stored is not None:
            await self._payloads.settled(stored, is_committed=result is None)
        if isinstance(result, Answer):
            operation.answer = result
            self._remember(operation)
        elif result is not None:
            self._pending.discard(request_id)
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
        if operation.sent_in != self._engine.life and self._engine.send_stored(
            lane, operation.request_id, operation.payload_bytes, operation.changed
        ):
            operation.sent_in = self._engine.life

    def cancel(self, sample: Operation) -> None:
        """Answer that the sample was cancelled, unless it has an answer."""
        if sample.answering or sample.settled:
            return
        sample.cancelled = True
        if self._drawer is not None and self._drawer.cancel(sample):
            self.fail([sample], _CANCELLED)
            return
        cancel = messages.Cancel(f"cancel-{uuid.uuid4().hex}", sample.request_id)
        if self._engine.withdraw(sample.request_id) or not self._engine.send(messages.encode(cancel)):
            self.fail([sample], _CANCELLED)

    def unanswered(self, model_id: str | None = None) -> list[Operation]:
        """Return the accepted operations without an answer, of a model or of all, oldest first."""
        found = self._pending.values() if model_id is None else self._pending.of_model(model_id)
        return [each for each in found if each.committed and not each.answering]

    # --- answers

    def on_answer(self, answer: Answer, encoded: bytes | None = None, ran: bool = True) -> None:
        """Record the answer to an operation; `encoded` is the engine's message, if it came from there.

        Answers to replays of finished operations are dropped. `ran` is False for an operation that has failed
        before any engine began it.
        """
        operation = self._pending.get(answer.request_id)
        if operation is None or operation.answering:
            self._engine.dealt_with(answer.request_id)
            return
        if isinstance(answer, messages.Failed) and answer.category == "missing":
            if not operation.cancelled:
                self._engine.dealt_with(answer.request_id)
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
        if isinstance(answer, messages.Done):
            operation.used = used(operation, answer.output, sample)
        encoded = encoded or messages.encode(answer)
        if isinstance(answer, messages.Done) and isinstance(answer.output, _TRAINED):
            write = partial(
                rows.finish_training,
                operation_id=operation.request_id,
                kind=operation.kind,
                model_id=operation.model_id,
                seq_id=operation.seq_id,
                answer=encoded,
                device_seconds=answer.device_seconds,
                trained=operation.used.get("trained", 0),
                metrics=answer.output.metrics,
            )
        else:
            write = partial(_finish, operation, answer, encoded, ran, sample)
        while True:
            try:
                await self._ledger.write(write)
                break
            except ApiError as error:
                log.error(
                    "the answer of %s is kept in memory until it can be written: %s", operation.kind, error
                )
                await asyncio.sleep(1)
        operation.answer = answer
        self._payloads.forget(operation.request_id)
        self._engine.dealt_with(operation.request_id)
        for listener in self.finished[operation.kind]:
            listener(operation)
        self._remember(operation)

    def _remember(self, operation: Operation) -> None:
        self._pending.discard(operation.request_id)
        self._remembered.add(operation)
        operation.answered()

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
        operation = self._pending.get(request_id) or self._remembered.get(request_id)
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

    async def forget_answers(self, owner: str, through: float) -> int:
        """Drop the answers that the owner's operations got up to the time `through`; return how many."""
        dropped = 0
        while some := await self._ledger.write(retention.drop_answers, through, owner):
            dropped += some
        self._remembered.forget(owner)
        return dropped

    def wake_all(self) -> None:
        """Stop: let every poll answer that its operation is still pending."""
        self.stopped = True
        for operation in self._pending.values():
            operation.finished.set()

    def load(self, row: Row) -> Operation:
        """Return the operation of a row; if it is in memory already, the same object."""
        known = self._pending.get(row.id) or self._remembered.get(row.id)
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
            self._pending.add(operation)
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
    operation: Operation,
    answer: Answer,
    encoded: bytes,
    ran: bool,
    sample: messages.Sample | None,
    connection: Connection,
) -> None:
    """Write an answer to the ledger; the operation's first answer also takes effect (`settle`)."""
    state = "done" if isinstance(answer, messages.Done) else "failed"
    is_first = rows.finish(connection, operation.request_id, state, encoded, answer.device_seconds)
    if operation.seq_id:
        rows.advance(connection, operation.model_id, operation.seq_id)
    if is_first:
        settle(connection, operation, answer, ran, sample)


def _sample(payload: bytes) -> messages.Sample:
    sample = messages.decode_to_engine(payload)
    assert isinstance(sample, messages.Sample)
    return sample
