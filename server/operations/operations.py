"""Accepted operations and their answers.

`accept` writes an operation into the ledger before anything else happens to it; a second submit with the
same natural key finds the first. The answer of the engine is written before anybody sees it. Polls wait on
an event and are answered from memory; older answers come from the ledger.

Operations that have no answer yet.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Iterable
from typing import Literal

from sqlalchemy import Connection, Row
from sqlalchemy.exc import SQLAlchemyError

from ...engine import logs, messages
from ..errors import ApiError, BadRequest
from ..events import Event
from ..files import Disk
from ..ledger import operations as rows
from ..ledger import payloads as payload_rows
from ..ledger import retention
from ..ledger.ledger import Ledger
from ..ledger.payloads import PayloadLost, Stored
from ..supervision.outbox import Lane
from ..supervision.supervisor import Supervisor
from .answers import KEPT, RememberedAnswers, note_replay, settle, used
from .dispatcher import Dispatcher
from .operation import Answer, EngineOnly, Operation, SampleDrawer, Submission
from .payloads import Payloads


class PendingOperations:
    """By id, and by model: a submit looks at those of its own model, whatever the others have queued."""

    def __init__(self) -> None:
        self._by_id: dict[str, Operation] = {}
        self._of_model: dict[str, dict[str, Operation]] = {}

    def get(self, request_id: str) -> Operation | None:
        return self._by_id.get(request_id)

    def add(self, operation: Operation) -> None:
        self._by_id[operation.request_id] = operation
        self._of_model.setdefault(operation.model_id, {})[operation.request_id] = operation

    def discard(self, request_id: str) -> None:
        operation = self._by_id.pop(request_id, None)
        if operation is not None:
            mine = self._of_model[operation.model_id]
            del mine[request_id]
            if not mine:
                del self._of_model[operation.model_id]

    def all(self) -> list[Operation]:
        """Oldest first."""
        return list(self._by_id.values())

    def of_model(self, model_id: str) -> list[Operation]:
        """Oldest first."""
        return list(self._of_model.get(model_id, {}).values())


log = logging.getLogger("tinsmith.operations")

_CANCELLED = "cancelled"
_STATES = {messages.Done: "done", messages.Failed: "failed"}


class Operations:
    """All operations of the server.

    `dispatcher` puts the operations of each model in order, `drawer` may draw samples in the engine's place.
    Events: `finished(operation)` when an operation has its answer, `weights_missing(sample, why)` for a
    sample whose weights the engine does not have.
    """

    def __init__(
        self,
        ledger: Ledger,
        engine: Supervisor,
        disk: Disk,
        payloads: Payloads,
        dispatcher: Dispatcher[Operation],
        drawer: SampleDrawer | None = None,
    ):
        self._ledger = ledger
        self._engine = engine
        self._disk = disk
        self._payloads = payloads
        self._dispatcher = dispatcher
        self._drawer = drawer or EngineOnly()
        self.finished: Event[[Operation]] = Event()
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
        """The operation of this submission, new or the first one of its natural key.

        Raises BadRequest if that first one was refused, or its turn was given up; Unavailable at a stop, or
        if the engine does not start; StorageFull for a new one that there is no room for.
        """
        self._engine.require_submits()
        # Shielded: a client that hangs up between the commit and the dispatch must not lose the operation.
        task = asyncio.ensure_future(self._accept(submission))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

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
        try:
            stored = None if payload is None else await self._store(operation, payload)
            del payload
            result = await self._write(operation, submission, stored)
        except BaseException:
            self._pending.discard(request_id)
            self._payloads.forget(request_id)
            raise
        if isinstance(result, Answer):
            operation.answer = result
            self._remember(operation)
        elif result is not None:
            self._pending.discard(request_id)
            self._payloads.forget(request_id)
            return self._first(result)
        operation.committed = True
        self.accepted += 1
        if operation.sequenced:
            self._dispatcher.add(operation)
        elif not operation.settled:
            self.send(operation)
        return operation

    async def _store(self, operation: Operation, payload: bytes) -> Stored | None:
        """Where the payload is; None if the operation was accepted before."""

        def is_new(connection: Connection) -> bool:
            key = operation.natural_key
            return key is None or rows.find_by_natural_key(connection, key) is None

        def before() -> bool:
            if not self._ledger.read_now(is_new):
                return False
            self._disk.require_room()
            return True

        return await self._payloads.store(
            operation.stream, operation.request_id, payload, operation.kind in KEPT, before
        )

    async def _write(
        self, operation: Operation, submission: Submission, stored: Stored | None
    ) -> Row | Answer | None:
        """The first operation of the natural key, if it is another one, or the answer, if it is known."""
        request_id, sequenced = operation.request_id, operation.sequenced
        past = sequenced and operation.seq_id < self._dispatcher.next_seq(operation.model_id)

        def change(connection: Connection) -> Row | Answer | None:
            if submission.natural_key is not None:
                first = rows.find_by_natural_key(connection, submission.natural_key)
                if first is not None:
                    return first
            if past:
                raise BadRequest(f"seq_id {operation.seq_id} of this model had its turn; use a new number")
            self._disk.require_room()
            answer = submission.also(connection, request_id) if submission.also else None
            rows.add(
                connection,
                id=request_id,
                owner=operation.owner,
                natural_key=submission.natural_key,
                kind=operation.kind,
                model_id=operation.model_id or None,
                seq_id=operation.seq_id if sequenced else None,
                session_id=submission.session_id,
                sampler_id=submission.sampler_id,
                sample_number=submission.sample_number,
                reply=operation.reply,
                dialect=operation.dialect,
                state="accepted" if answer is None else _STATES[type(answer)],
                answer=None if answer is None else messages.encode(answer),
            )
            if answer is None and stored is not None:
                payload_rows.add(
                    connection,
                    request_id,
                    operation.model_id or None,
                    operation.seq_id if sequenced else None,
                    stored,
                )
            return answer

        try:
            result = await self._ledger.write(change)
        except BaseException:
            if stored is not None:
                await self._payloads.abandoned(stored)
            raise
        if stored is not None:
            if result is None:
                self._payloads.committed(stored)
            else:
                await self._payloads.abandoned(stored)
        return result

    def send(self, operation: Operation) -> None:
        """To whoever is to answer it."""
        if operation.cancelled:
            self.fail([operation], _CANCELLED)
        elif operation.kind != "sample":
            self.send_to_engine(operation)
        elif (payload := operation.changed or self._payloads.remembered(operation.request_id)) is not None:
            self._send_sample(operation, payload)
        else:
            task = asyncio.ensure_future(self._load_and_send(operation))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _send_sample(self, operation: Operation, payload: bytes) -> None:
        if not self._drawer.take(operation, _sample(payload), self):
            self.send_to_engine(operation)

    async def _load_and_send(self, operation: Operation) -> None:
        payload = await self._load(operation)
        if payload is not None and not operation.answering:
            self._send_sample(operation, payload)

    async def _load(self, operation: Operation) -> bytes | None:
        """Its message to the engine. Fails an operation whose payload is lost, and returns None then."""
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
        """What it asks of the engine; None for one whose payload is not kept.

        Raises ApiError, SQLAlchemyError or OSError.
        """
        payload = operation.changed or await self._payloads.load(operation.request_id)
        return None if payload is None else messages.decode_to_engine(payload)

    def send_to_engine(self, operation: Operation, behind: str | None = None) -> None:
        """To the one there is, once; without one it waits for the next. `behind`: a model whose operations
        go first."""
        assert operation.payload_bytes
        if operation.sent_in != self._engine.life and self._engine.send_stored(
            Lane(behind) if behind else _lane(operation),
            operation.request_id,
            operation.payload_bytes,
            operation.changed,
        ):
            operation.sent_in = self._engine.life

    def cancel(self, sample: Operation) -> None:
        """Its answer is then that it was cancelled, if it has none yet."""
        if sample.answering or sample.settled:
            return
        sample.cancelled = True
        if self._drawer.cancel(sample):
            self.fail([sample], _CANCELLED)
            return
        cancel = messages.Cancel(f"cancel-{uuid.uuid4().hex}", sample.request_id)
        if self._engine.withdraw(sample.request_id) or not self._engine.send(messages.encode(cancel)):
            self.fail([sample], _CANCELLED)

    def unanswered(self, model_id: str | None = None) -> list[Operation]:
        """All, or a model's, that the ledger has accepted and the engine has not answered, oldest first."""
        found = self._pending.all() if model_id is None else self._pending.of_model(model_id)
        return [each for each in found if each.committed and not each.answering]

    def _first(self, row: Row) -> Operation:
        operation = self._pending.get(row.id) or self._remembered.get(row.id) or self._from_row(row)
        if operation.rejected and operation.answer is not None:
            assert isinstance(operation.answer, messages.Failed)
            raise BadRequest(operation.answer.message)
        return operation

    # --- answers

    def on_answer(self, answer: Answer, ran: bool = True) -> None:
        """The engine's answer. Those to replays of finished operations are dropped."""
        operation = self._pending.get(answer.request_id)
        if operation is None or operation.answering:
            self._engine.dealt_with(answer.request_id)
            return
        if isinstance(answer, messages.Failed) and answer.category == "missing" and operation.cancelled:
            answer = messages.Failed(answer.request_id, _CANCELLED, "user")
        elif isinstance(answer, messages.Failed) and answer.category == "missing":
            self._engine.dealt_with(answer.request_id)
            self.weights_missing(operation, answer.message)
            return
        operation.answering = True
        task = asyncio.ensure_future(self._finish(operation, answer, ran))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _finish(self, operation: Operation, answer: Answer, ran: bool) -> None:
        encoded = messages.encode(answer)
        sample: messages.Sample | None = None
        if operation.kind == "sample" and isinstance(answer, messages.Done):
            payload = await self._load(operation)
            if payload is None:
                answer = messages.Failed(operation.request_id, "the sample's payload is lost", "server")
                encoded = messages.encode(answer)
            else:
                sample = _sample(payload)

        def change(connection: Connection) -> None:
            state, seconds = "done" if isinstance(answer, messages.Done) else "failed", answer.device_seconds
            first = rows.finish(connection, operation.request_id, state, encoded, seconds)
            if operation.sequenced:
                rows.advance(connection, operation.model_id, operation.seq_id)
            if first:
                note_replay(connection, operation, answer, ran)
                settle(connection, operation, answer, sample)

        while True:
            try:
                await self._ledger.write(change)
                break
            except ApiError as error:
                log.error(
                    "the answer of %s is kept in memory until it can be written: %s", operation.kind, error
                )
                await asyncio.sleep(1)
        operation.answer = answer
        if isinstance(answer, messages.Done):
            operation.used = used(operation, answer.output, sample)
        self._payloads.forget(operation.request_id)
        self._engine.dealt_with(operation.request_id)
        self.finished(operation)
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
        """`ran`: the engine has begun them, and a replay must know that they failed."""
        for operation in operations:
            self.on_answer(messages.Failed(operation.request_id, message, category), ran)

    def _give_up(self, operations: list[Operation], missing: int) -> None:
        seconds = self._dispatcher.gap_grace_seconds
        self.fail(
            operations,
            f"seq_id {missing} of this model never arrived within {seconds:.0f} s; "
            "the operations sent after it were not run",
        )

    # --- polls

    async def find(self, owner: str, request_id: str) -> Operation | None:
        """The owner's operation of that id, in whatever state; None for one whose answer was dropped."""
        operation = self._pending.get(request_id) or self._remembered.get(request_id)
        if operation is None:
            row = await self._ledger.read(lambda connection: rows.find(connection, request_id))
            if row is None:
                return None
            # It may have been loaded, or have come to its answer, in the meantime.
            operation = (
                self._pending.get(request_id) or self._remembered.get(request_id) or self._from_row(row)
            )
        return operation if operation.owner == owner and not operation.expired else None

    async def parts(self, operation: Operation) -> list[Operation]:
        """Those whose answers together are its own: mostly itself. Without those that were dropped."""
        found = [await self.find(operation.owner, each) for each in operation.reply.get("parts", [])]
        return [part for part in found if part is not None] or [operation]

    async def has_expired(self, owner: str, request_id: str) -> bool:
        """Whether it was the owner's operation, and its answer was dropped."""
        row = await self._ledger.read(lambda connection: rows.find(connection, request_id))
        return row is not None and row.owner == owner

    async def forget_answers(self, owner: str, through: float) -> int:
        """Of the owner's operations that were answered until then; of how many."""
        dropped = 0
        while some := await self._ledger.write(
            lambda connection: retention.drop_answers_of(connection, owner, through)
        ):
            dropped += some
        self._remembered.forget(owner)
        return dropped

    def wake_all(self) -> None:
        """The server stops: every poll answers that its operation is still pending."""
        self.stopped = True
        for operation in self._pending.all():
            operation.finished.set()

    def _from_row(self, row: Row) -> Operation:
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

    def load(self, row: Row) -> Operation:
        """The operation of a row, one object per operation."""
        return self._pending.get(row.id) or self._remembered.get(row.id) or self._from_row(row)

    async def written(self) -> None:
        """Waits until the answers received so far are written."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def settle(self) -> None:
        """Waits until there is no answer left to write."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)


def _lane(operation: Operation) -> Lane:
    model_id = operation.model_id
    return Lane(model_id) if model_id else Lane(owner=f"{operation.kind} of {operation.owner}")


def _sample(payload: bytes) -> messages.Sample:
    sample = messages.decode_to_engine(payload)
    assert isinstance(sample, messages.Sample)
    return sample
