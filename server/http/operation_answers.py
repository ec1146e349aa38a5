"""Answers of accepted operations, written once in the form that the client asks for."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from typing import Any

import orjson
from fastapi.responses import Response

from ...engine import messages
from ..base_models import BaseModels
from ..dialect import DIALECT_RULES, Dialect
from ..errors import ApiError, BadRequest, Gone, NotFound, Unavailable
from ..models.admission import Admission
from ..offload import Offload
from ..operations.operation import Operation
from ..operations.operations import Operations
from ..supervision.supervisor import Supervisor
from ..text import of_folder
from ..wire import results
from ..wire.results import tokens_of

_INLINE_BYTES = 64 << 10  # of numbers; they are written as JSON in a few milliseconds
PROMPT_END = "prompt_end"
"""The key, in a sample's reply, of the last tokens of its prompt, after which its text is decoded. Clients
do not get it."""


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
        long_poll_seconds: float,
    ):
        self._operations = operations
        self._engine = engine
        self._admission = admission
        self._offload = offload
        self._base_models = base_models
        self._long_poll_seconds = long_poll_seconds

    async def poll(
        self,
        owner: str,
        request_id: str,
        requested: Dialect | None,
        wants_protobuf: bool = False,
        most_seconds: float = math.inf,
        wrapped: bool = False,
    ) -> Response:
        """Return the answer, or after a while say that the client should ask again.

        `requested` is the dialect of the request, None if it shows none; `wrapped` as in `answered`. Raises
        Gone, or NotFound for what is none of the caller's requests, where the dialect tells the two apart.
        """
        operation = await self._operations.find(owner, request_id)
        if operation is None:
            raise await self._unknown(owner, request_id, requested)
        dialect = requested or operation.dialect
        parts = await self._operations.parts(operation)
        # Polls that came at once, thousands after a restart, do not end at once.
        until = time.monotonic() + min(self._long_poll_seconds * random.uniform(0.8, 1.0), most_seconds)
        for part in parts:
            if part.answer is None and not self._operations.stopped:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(part.finished.wait(), max(0.0, until - time.monotonic()))
            if part.answer is None:
                return self._pending(operation, dialect)
        return await self.answered(operation, parts, dialect, wants_protobuf, wrapped)

    async def _unknown(self, owner: str, request_id: str, requested: Dialect | None) -> ApiError:
        message = f"unknown request {request_id[:192]!r}: it was never accepted, or its answer has expired"
        tells_apart = DIALECT_RULES[requested or "tinkercloud"].unknown_status == NotFound.status
        if tells_apart and not await self._operations.has_expired(owner, request_id):
            return NotFound(message)
        return Gone(message)

    async def when_answered(self, operation: Operation, dialect: Dialect) -> Response:
        """Return the answer, however long it takes. Raises Unavailable at a stop."""
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
        """Write the answer of an operation whose `parts` have theirs.

        `wrapped`: with the result under `result` too, and a `status` that says that the operation is over.
        """
        outputs: list[messages.Output] = []
        for part in parts:
            if isinstance(answer := part.answer, messages.Failed):
                status = DIALECT_RULES[dialect].failed_status
                failure = {"error": answer.message, "category": answer.category, "detail": answer.message}
                return json_response(failure | {"status": "failed", "status_code": status}, status)
            if answer is not None:
                outputs.append(answer.output)
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
        """Say that there is no answer yet, and why: the engine's state, or a quota that was reached."""
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
        """Decode the samples' text, if the model has a tokenizer."""
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
