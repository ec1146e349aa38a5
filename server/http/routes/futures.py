"""Answers of accepted operations: their form for each client, and long polls for them."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from typing import Any

import orjson
from fastapi import APIRouter, Request
from fastapi.responses import Response

from ....engine import messages
from ...base_models import BaseModels
from ...dialect import DIALECT_RULES, Dialect, requested_dialect
from ...errors import ApiError, BadRequest, Gone, NotFound, Unavailable
from ...models.samplers import Samplers
from ...models.submits import Admission
from ...offload import Offload
from ...operations.operation import Operation
from ...operations.operations import Operations
from ...operations.sample_streams import Completions
from ...settings import Settings
from ...supervision.supervisor import Supervisor
from ...text import of_folder
from ...wire import requests, responses, results
from ...wire.results import tokens_of
from ..bodies import BodyRoute
from ..dependencies import Owner, Provided, described_as
from ..samples import PROMPT_END

router = APIRouter(prefix="/api/v1", tags=["futures"], route_class=BodyRoute)

# Answers over this size are announced first, where the client allows it, so that it can bound its memory.
METADATA_FIRST_BYTES = 1 << 20
AT_ONCE_SECONDS = 1.0
_INLINE_BYTES = 64 << 10  # of numbers; they are written as JSON in a few milliseconds


def json_response(body: dict[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(body), status, media_type="application/json")


class OperationAnswers:
    """Answers polls for the results of operations, and requests that wait for their own result."""

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
        request: Request,
        wants_protobuf: bool = False,
        most_seconds: float = math.inf,
        wrapped: bool = False,
    ) -> Response:
        """Return the answer, or after a while say that the client should ask again.

        `wrapped` as in `answered`. Raises Gone, or NotFound for what is none of the caller's requests, where
        the dialect tells the two apart.
        """
        operation = self._operations.known.get(request_id)
        if operation is None or operation.owner != owner or operation.expired:
            operation = await self._operations.find(owner, request_id)
        if operation is None:
            raise await self._unknown(owner, request_id, requested_dialect(request.headers, request.url.path))
        parts = [operation] if "parts" not in operation.reply else await self._operations.parts(operation)
        # Spread the ends of polls that came at the same time (after a restart, thousands).
        until = time.monotonic() + min(self._long_poll_seconds * random.uniform(0.8, 1.0), most_seconds)
        for part in parts:
            if part.answer is None and not self._operations.stopped:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(part.finished.wait(), max(0.0, until - time.monotonic()))
        if wants_protobuf and all(isinstance(part.answer, messages.Done) for part in parts):
            answer = parts[0].answer
            assert isinstance(answer, messages.Done)
            if (serialized := results.as_protobuf(answer.output)) is not None:
                return Response(serialized, media_type=results.PROTOBUF)
        dialect = requested_dialect(request.headers, request.url.path) or operation.dialect
        if any(part.answer is None for part in parts):
            return self._pending(operation, dialect)
        return await self.answered(operation, parts, dialect, wrapped)

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
        wrapped: bool = False,
    ) -> Response:
        """Return the answer of a finished operation as JSON; its `parts` have all been answered.

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
        """Say that there is no answer yet, and why: the engine's state, or a quota that was reached.

        While the engine loads, compiles or is started again, nothing moves, and the SDK logs the reasons of
        pauses only.
        """
        is_working = self._engine.phase == "ready"
        state, reason = "active" if is_working else "paused_capacity", self._engine.text
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


@router.post("/retrieve_future", responses=described_as(responses.Polled, binary=results.PROTOBUF))
async def retrieve_future(
    body: requests.RetrieveFuture,
    request: Request,
    answers: Provided[OperationAnswers],
    owner: Owner,
) -> Response:
    """Wait for the operation's answer, at most `long_poll_seconds`; then tell the client to ask again."""
    wants_protobuf = results.PROTOBUF in request.headers.get("accept", "")
    answer = await answers.poll(owner, body.request_id, request, wants_protobuf)
    if body.allow_metadata_only and len(answer.body) > METADATA_FIRST_BYTES:
        return json_response({"status": "complete_metadata", "response_payload_size": len(answer.body)})
    return answer


@router.post("/retrieve_future/{request_id}", responses=described_as(responses.PolledByPath))
async def retrieve_future_of_path(
    request_id: str, request: Request, answers: Provided[OperationAnswers], owner: Owner
) -> Response:
    """Answer as `retrieve_future` does, but at once, and with the result also under `result`."""
    return await answers.poll(owner, request_id, request, most_seconds=AT_ONCE_SECONDS, wrapped=True)


@router.post("/cleanup_futures", responses=described_as(responses.CleanedFutures))
async def cleanup_futures(
    body: requests.CleanupFutures, operations: Provided[Operations], owner: Owner
) -> dict[str, Any]:
    """Drop the caller's answers that are older than `max_age_hours`. Pending operations stay."""
    before = time.time() - 3600 * body.max_age_hours
    cleaned = await operations.forget_answers(owner, before)
    return {
        "cleaned_count": cleaned,
        "futures_cleaned": cleaned,
        "message": f"the answers of {cleaned} requests are forgotten",
    }


@router.post("/retrieve_futures", responses=described_as(responses.SampleCompletions))
async def retrieve_futures(
    body: requests.RetrieveFutures,
    settings: Provided[Settings],
    operations: Provided[Operations],
    completions: Provided[Completions],
    samplers: Provided[Samplers],
    owner: Owner,
) -> dict[str, Any]:
    """Wait for the first answer to a sample of the sampling session, as `retrieve_future` for one request.

    What the client says it has retrieved may be forgotten; here answers stay as long as all others.
    """
    sampler = await samplers.find(owner, body.target.sampling_session_id)
    patience = settings.long_poll_seconds * random.uniform(0.8, 1.0)
    seconds = patience if body.timeout is None else min(patience, body.timeout)
    answered, cursor = await completions.poll(
        sampler.session_id,
        sampler.id,
        body.target.cloned_sampler_id,
        body.prev_cursor,
        0.0 if operations.stopped else seconds,
    )
    if not answered and operations.stopped:
        raise Unavailable("the server stops")  # which clients ask again after a second
    listed = [
        {"state": "failed" if each.failed else "finished", "request_id": each.request_id} for each in answered
    ]
    return {"completions": listed, "cursor": cursor}


@router.post("/cancel_future", responses=described_as(responses.CancelledFuture))
async def cancel_future(
    body: requests.CancelFuture, operations: Provided[Operations], owner: Owner
) -> dict[str, str]:
    """Cancel a sample. Training operations stay, because those after them build on them."""
    operation = await operations.find(owner, body.request_id)
    if operation is not None and operation.kind == "sample" and operation.answer is None:
        operations.cancel(operation)
    return {"type": "cancel_future"}
