"""The answers of accepted operations, in the shape of the client's dialect."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import orjson
from fastapi.responses import Response

from ...engine import messages
from ..base_models import BaseModels
from ..dialect import DIALECT_RULES, Dialect
from ..errors import BadRequest, Gone, NotFound, Unavailable
from ..models.admission import Admission
from ..offload import Offload
from ..operations.operation import Operation
from ..operations.operations import Operations
from ..supervision.supervisor import Supervisor
from ..text.tokenizer import of_folder
from ..wire import results
from ..wire.results import tokens_of

_INLINE_BYTES = 64 << 10  # of numbers; they are written as JSON in a few milliseconds
PROMPT_END = "prompt_end"
"""In the reply of a sample: the last tokens of its prompt, which its text goes on from. Not for clients."""


def json_response(body: dict[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(body), status, media_type="application/json")


class OperationAnswers:
    """Answers polls of operations, and requests that wait for theirs."""

    def __init__(
        self,
        operations: Operations,
        engine: Supervisor,
        admission: Admission,
        offload: Offload,
        base_models: BaseModels,
    ):
        self._operations = operations
        self._engine = engine
        self._admission = admission
        self._offload = offload
        self._base_models = base_models

    async def find(self, owner: str, request_id: str, said: Dialect | None) -> Operation:
        """Raises Gone, or NotFound for what is none of the caller's requests, where the dialect tells the two
        apart."""
        operation = await self._operations.find(owner, request_id)
        if operation is not None:
            return operation
        message = f"unknown request {request_id[:192]!r}: it was never accepted, or its answer has expired"
        unknown = DIALECT_RULES[said or "tinkercloud"].unknown_status == NotFound.status
        if unknown and not await self._operations.has_expired(owner, request_id):
            raise NotFound(message)
        raise Gone(message)

    async def poll(
        self,
        operation: Operation,
        seconds: float,
        dialect: Dialect,
        wants_protobuf: bool,
        wrapped: bool,
    ) -> Response:
        parts = await self._operations.parts(operation)
        until = time.monotonic() + seconds
        for part in parts:
            if part.answer is None and not self._operations.stopped:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(part.finished.wait(), max(0.0, until - time.monotonic()))
            if part.answer is None:
                return self._pending(operation, dialect)
        return await self.answered(operation, parts, dialect, wants_protobuf, wrapped)

    async def when_answered(self, operation: Operation, dialect: Dialect) -> Response:
        """The answer, however long it takes. Raises Unavailable at a stop."""
        parts = await self._operations.parts(operation)
        for part in parts:
            await part.finished.wait()
            if part.answer is None:
                raise Unavailable("the server stops")
        return await self.answered(operation, parts, dialect)

    async def answered(
        self,
        operation: Operation,
        parts: list[Operation],
        dialect: Dialect,
        wants_protobuf: bool = False,
        wrapped: bool = False,
    ) -> Response:
        """The answer of an operation whose `parts` have theirs. `wrapped`: as a poll by path has it, with the
        result under `result` too, and a `status` that says that the operation is over."""
        answers = [part.answer for part in parts]
        for answer in answers:
            if isinstance(answer, messages.Failed):
                status = DIALECT_RULES[dialect].failed_status
                failure = {"error": answer.message, "category": answer.category, "detail": answer.message}
                return json_response(failure | {"status": "failed", "status_code": status}, status)
        outputs = [answer.output for answer in answers if isinstance(answer, messages.Done)]
        serialized = results.as_protobuf(outputs[0]) if wants_protobuf else None
        if serialized is not None:
            return Response(serialized, media_type=results.PROTOBUF)
        owner = operation.owner
        reply = {name: value for name, value in operation.reply.items() if name != PROMPT_END}
        size = results.size(outputs)
        texts = None
        if "base_model" in parts[0].reply:  # of clients that have no tokenizer
            texts = await self._offload.in_thread(owner, self._texts, outputs, parts[0])
        if size <= _INLINE_BYTES:
            return json_response(results.body(outputs, dialect, reply, texts, wrapped))
        encoded = [results.encode(outputs)]
        rendered = await self._offload.in_process(
            owner, results.rendered, encoded, dialect, reply, texts, wrapped
        )
        return Response(rendered, media_type="application/json")

    def _pending(self, operation: Operation, dialect: Dialect) -> Response:
        """The engine's state, or that the tenant has reached a quota."""
        state, reason = "active" if self._engine.alive else "paused_capacity", self._engine.text
        paused = self._admission.paused(operation.owner)
        if self._engine.alive and paused is not None:
            state, reason = "paused_rate_limit", paused
        return json_response(
            {
                "type": "try_again",
                "status": "pending",
                "result": None,
                "request_id": operation.request_id,
                "queue_state": state,
                "queue_state_reason": reason,
            },
            DIALECT_RULES[dialect].pending_status,
        )

    def _texts(self, outputs: list[messages.Output], part: Operation) -> list[str] | None:
        """What the samples say, if the model has a tokenizer."""
        try:
            tokenizer = of_folder(self._base_models.named(part.reply["base_model"]).folder)
        except BadRequest:
            return None
        sequences = [
            sequence
            for output in outputs
            if isinstance(output, messages.SampleOutput)
            for sequence in output.sequences
        ]
        before = part.reply.get(PROMPT_END, [])
        return [tokenizer.continuation(before, tokens_of(sequence.tokens)) for sequence in sequences]
