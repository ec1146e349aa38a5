"""Operations: accepted requests, those in memory, the order of each model's, and what routers submit.

Clients number the operations of a model 1, 2, 3, … and may send them out of order; what arrives early is
held. A number that never arrives (the client gave up on its submit) would hold everything after it for
ever. So the dispatcher waits `gap_grace_seconds` for a missing number, longer than a client keeps resending,
and then gives up the held operations, because without the missing one they would train something else. A
number that was refused at its submit is recorded, and leaves no gap.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import msgspec
from sqlalchemy import Connection

from ...engine import messages
from ..dialect import Dialect
from ..events import Event

Answer = messages.Done | messages.Failed


TRACE_PARENT: ContextVar[str] = ContextVar("trace_parent", default="")
"""The `traceparent` header of the request that is being answered, for an operation that it submits."""


@dataclass(eq=False, slots=True)
class Operation:
    """One accepted request. `seq_id` is its number in its model's sequence, 0 if it has no place there."""

    request_id: str
    owner: str
    kind: str
    model_id: str
    seq_id: int
    reply: dict[str, Any]
    payload_bytes: int = 0  # of the message to the engine, which payloads.py has
    answer: Answer | None = None  # None until it is finished
    rejected: bool = False
    expired: bool = False  # it had an answer, which was dropped
    committed: bool = False  # it is in the ledger
    answering: bool = False
    cancelled: bool = False  # its client does not wait for it any more
    sent_in: int = 0  # the engine's life in which it was sent
    weights_made_in: int = 0  # that in which the weights it samples were made again
    changed: bytes | None = None  # a message that goes to the engine instead of that one
    natural_key: str | None = None
    session_id: str | None = None  # of an uploaded loss or a numbered sample
    accepted_at: float = field(default_factory=time.monotonic)
    used: dict[str, int] = field(default_factory=dict)  # tokens by kind, and checkpoints
    dialect: Dialect = "tinker"
    trace_parent: str = field(default_factory=TRACE_PARENT.get)
    finished: asyncio.Event = field(default_factory=asyncio.Event)
    listener: Callable[[Operation], None] | None = None

    def when_answered(self, listener: Callable[[Operation], None]) -> None:
        """Have `listener` called when there is an answer; a later one takes its place."""
        self.listener = listener

    @property
    def settled(self) -> bool:
        return self.answer is not None or self.expired


_REMEMBERED_BYTES = 16 << 20
_OPERATION_BYTES = 2048  # its objects, whatever is in them
_REPLY_FACTOR = 4  # of the size of a reply's objects to that of its text


class KnownOperations(dict[str, Operation]):
    """Operations in memory, by id: all that wait for an answer, and the newest answered ones, up to so many
    bytes; older ones are read from the ledger.

    An owner with more than half of the bytes is the first to lose its oldest.
    """

    def __init__(self, max_bytes: int = _REMEMBERED_BYTES):
        super().__init__()
        self.waiting: dict[str, Operation] = {}
        """Those without an answer, by id, the oldest first."""
        self._waiting_of: dict[str, dict[str, Operation]] = {}  # by model
        self._max_bytes = max_bytes
        self._sizes: OrderedDict[str, int] = OrderedDict()  # of the answered ones by id, the oldest first
        self._answered_of: dict[str, OrderedDict[str, None]] = {}  # ids by owner, the oldest first
        self._bytes_of: Counter[str] = Counter()  # by owner
        self._bytes = 0

    def add(self, operation: Operation) -> None:
        """Add an operation that waits for its answer."""
        request_id = operation.request_id
        self[request_id] = self.waiting[request_id] = operation
        self._waiting_of.setdefault(operation.model_id, {})[request_id] = operation

    def discard(self, operation: Operation) -> None:
        """Forget an operation that waits for its answer: it was not accepted."""
        if self.waiting.pop(operation.request_id, None) is not None:
            of_model = self._waiting_of[operation.model_id]
            del of_model[operation.request_id], self[operation.request_id]
            if not of_model:
                del self._waiting_of[operation.model_id]

    def waiting_of(self, model_id: str) -> list[Operation]:
        """Return the model's operations without an answer, oldest first."""
        return list(self._waiting_of.get(model_id, {}).values())

    def answered(self, operation: Operation, answer_bytes: int) -> None:
        """Wake everybody who waits for the operation's answer, which is there and takes so many bytes."""
        request_id, owner = operation.request_id, operation.owner
        if self.waiting.pop(request_id, None) is not None:
            of_model = self._waiting_of[operation.model_id]
            del of_model[request_id]
            if not of_model:
                del self._waiting_of[operation.model_id]
        elif request_id in self._sizes:
            self._remove(request_id)
        size = _OPERATION_BYTES + answer_bytes + _REPLY_FACTOR * len(str(operation.reply))
        self[request_id] = operation
        self._sizes[request_id] = size
        self._answered_of.setdefault(owner, OrderedDict())[request_id] = None
        self._bytes_of[owner] += size
        self._bytes += size
        while self._bytes > self._max_bytes and len(self._sizes) > 1:
            is_greedy = self._bytes_of[owner] > self._max_bytes / 2 and len(self._answered_of[owner]) > 1
            self._remove(next(iter(self._answered_of[owner] if is_greedy else self._sizes)))
        operation.finished.set()
        if operation.listener is not None:
            operation.listener(operation)

    def newest_answered(self, owner: str, most: int) -> dict[str, int]:
        """Return the owner's most recently active models, `most` of them, each with its newest `seq_id`."""
        found: dict[str, int] = {}
        for request_id in reversed(self._answered_of.get(owner, OrderedDict())):
            operation = self[request_id]
            if operation.seq_id and operation.model_id not in found:
                found[operation.model_id] = operation.seq_id
                if len(found) == most:
                    break
        return found

    def forget_answered(self, owner: str) -> None:
        """Forget the owner's answered operations here; the ledger may still have them."""
        for request_id in list(self._answered_of.get(owner, ())):
            self._remove(request_id)

    def _remove(self, request_id: str) -> None:
        owner, size = self.pop(request_id).owner, self._sizes.pop(request_id)
        self._bytes -= size
        self._bytes_of[owner] -= size
        del self._answered_of[owner][request_id]
        if not self._answered_of[owner]:
            del self._answered_of[owner], self._bytes_of[owner]


@dataclass
class Sequence:
    """The operations of one model in order: the number whose turn it is, and operations that came early."""

    next_seq: int
    reserved: int = 0  # numbers up to this are given to operations that are about to arrive
    held: dict[int, Operation] = field(default_factory=dict)
    gap_timer: asyncio.TimerHandle | None = None


class Dispatcher:
    """Releases each model's operations in order.

    `released(operation)`: it is the operation's turn. `gave_up(operations, missing_seq)`: the number
    `missing_seq` has not arrived in `gap_grace_seconds`, and these operations after it are not run.
    """

    def __init__(self, gap_grace_seconds: float):
        self.gap_grace_seconds = gap_grace_seconds
        self.released: Event[[Operation]] = Event()
        self.gave_up: Event[[list[Operation], int]] = Event()
        self.sequences: dict[str, Sequence] = {}  # by model

    def open(self, model_id: str, next_seq: int) -> None:
        """Begin a model's sequence at `next_seq`: the operations before it have had their turn."""
        self.sequences.setdefault(model_id, Sequence(next_seq))

    def close(self, model_id: str) -> None:
        sequence = self.sequences.pop(model_id, None)
        if sequence is not None and sequence.gap_timer is not None:
            sequence.gap_timer.cancel()

    def next_seq(self, model_id: str) -> int:
        """Return the number whose turn it is."""
        return self.sequences[model_id].next_seq

    def last_seq(self, model_id: str) -> int:
        """Return the highest number that has arrived, or is about to."""
        sequence = self.sequences[model_id]
        return max(sequence.next_seq - 1, sequence.reserved, *sequence.held)

    def reserve(self, model_id: str) -> int:
        """Return a number after all others, for a client without numbers. The operation has to arrive."""
        sequence = self.sequences[model_id]
        sequence.reserved = self.last_seq(model_id) + 1
        return sequence.reserved

    def add(self, operation: Operation) -> None:
        """Take an operation that has arrived. One whose number has had its turn is not run again."""
        sequence = self.sequences[operation.model_id]
        if operation.seq_id < sequence.next_seq:
            return
        sequence.held.setdefault(operation.seq_id, operation)
        started_at = sequence.next_seq
        while (due := sequence.held.pop(sequence.next_seq, None)) is not None:
            sequence.next_seq += 1
            if due.answer is None and not due.expired:
                for listener in self.released:
                    listener(due)
        moved = sequence.next_seq != started_at
        if sequence.gap_timer is not None and (moved or not sequence.held):
            sequence.gap_timer.cancel()
            sequence.gap_timer = None
        if sequence.held and sequence.gap_timer is None:
            sequence.gap_timer = asyncio.get_running_loop().call_later(
                self.gap_grace_seconds, self._gap_stayed_open, operation.model_id
            )

    def _gap_stayed_open(self, model_id: str) -> None:
        sequence = self.sequences[model_id]
        sequence.gap_timer = None
        missing = sequence.next_seq
        sequence.next_seq = max(sequence.held) + 1
        given_up = [sequence.held.pop(seq_id) for seq_id in sorted(sequence.held)]
        self.gave_up([operation for operation in given_up if not operation.settled], missing)


@dataclass(frozen=True)
class Submission:
    """An operation that a router submits.

    `message` builds the engine's message from the request id; None: `also` has the answer. `also` writes
    further rows in the same transaction, and may return what is then the answer. Sequenced operations have a
    model and a seq_id from 1; the others have seq_id 0 and run at once. Uploaded losses and numbered samples
    have a session; the samples also have a sampling session, and a number in it.
    """

    owner: str
    kind: str
    natural_key: str | None
    message: Callable[[str], messages.ToEngine] | None
    reply: dict[str, Any] = field(default_factory=dict)
    model_id: str = ""
    seq_id: int = 0
    also: Callable[[Connection, str], Answer | None] | None = None
    dialect: Dialect = "tinker"
    session_id: str | None = None
    sampler_id: str | None = None
    sample_number: int | None = None

    @classmethod
    def done_at_once(cls, owner: str, kind: str, reply: dict[str, Any], dialect: Dialect) -> Submission:
        """Return an operation without work for the engine: its answer is `reply`, as soon as it is
        accepted."""

        def done(_connection: Connection, request_id: str) -> Answer:
            return messages.Done(request_id, messages.Nothing())

        return cls(owner, kind, None, None, reply, also=done, dialect=dialect)


natural_key: Callable[[str, int], str] = "model/{}/{}".format
"""Make the natural key of a model's operation from the model's id and the number."""


class Outcome(Protocol):
    """Takes what became of samples that the engine does not draw."""

    def on_answer(self, answer: Answer) -> None:
        """Take the answer to a sample."""

    def fail(
        self, operations: list[Operation], message: str, category: Literal["user", "server"] = "user"
    ) -> None:
        """Answer samples that cannot be drawn."""

    def send_to_engine(self, operation: Operation) -> None:
        """Have the engine draw the sample after all."""


class SampleDrawer(Protocol):
    """Draws samples in the engine's place."""

    def take(self, operation: Operation, sample: messages.Sample, outcome: Outcome) -> bool:
        """Return whether it draws this sample; it then answers to `outcome`. May be called again."""

    def cancel(self, operation: Operation) -> bool:
        """Stop drawing the sample; return whether it was being drawn here."""


_OBJECT = 64  # of its header, and of its place where it is referred to


def held_bytes(value: Any) -> int:
    """Estimate the memory of text, bytes, lists, dictionaries and messages, with all that is in them."""
    if isinstance(value, (bytes, bytearray, str)):
        return _OBJECT + len(value)
    if isinstance(value, dict):
        return _OBJECT + sum(held_bytes(key) + held_bytes(each) for key, each in value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return _OBJECT + sum(map(held_bytes, value))
    if isinstance(value, msgspec.Struct):
        return _OBJECT + sum(held_bytes(getattr(value, name)) for name in value.__struct_fields__)
    return _OBJECT
