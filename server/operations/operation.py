"""Operations: accepted requests, what routers submit to have one accepted, and who else draws samples."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import msgspec
from sqlalchemy import Connection

from ...engine import messages
from ..dialect import Dialect

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
    _listener: Callable[[Operation], None] | None = None

    def when_answered(self, listener: Callable[[Operation], None]) -> None:
        """Have `listener` called when there is an answer; a later one takes its place."""
        self._listener = listener

    def answered(self) -> None:
        """Wake everybody who waits for the answer."""
        self.finished.set()
        if self._listener is not None:
            self._listener(self)

    @property
    def settled(self) -> bool:
        return self.answer is not None or self.expired


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


def stream_of(model_id: str | None, kind: str) -> str:
    """Name the stream of an operation's payload. Payloads of one stream are forgotten together."""
    return model_id or kind


def natural_key(model_id: str, seq_id: int) -> str:
    return f"model/{model_id}/{seq_id}"


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
