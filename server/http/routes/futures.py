"""Answers of accepted operations, by long poll."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from typing import Any

import orjson
from fastapi import APIRouter, Request
from fastapi.responses import Response

from ....engine import messages
from ...dialect import POINTS, Dialect
from ...errors import BadRequest, Gone, NotFound, Unavailable
from ...operations.operation import Operation
from ...text.tokenizer import of_folder
from ...wire import requests, responses, results
from ...wire.sampled import tokens_of
from ..bodies import BodyRoute
from ..dependencies import Backend, BackendOf, Owner, Said, described_as

router = APIRouter(prefix="/api/v1", tags=["futures"], route_class=BodyRoute)

# Answers over this size are announced first, where the client allows it, so that it can bound its memory.
METADATA_FIRST_BYTES = 1 << 20
_INLINE_BYTES = 64 << 10  # of numbers; they are written as JSON in a few milliseconds
AT_ONCE_SECONDS = 1.0
PROMPT_END = "prompt_end"
"""In the reply of a sample: the last tokens of its prompt, which its text goes on from. Not for clients."""


def _json(body: dict[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(body), status, media_type="application/json")


def _pending(backend: Backend, operation: Operation, dialect: Dialect) -> Response:
    """The engine's state, or that the tenant has reached a quota."""
    state, reason = "active" if backend.engine.alive else "paused_capacity", backend.engine.text
    paused = backend.admission.paused(operation.owner)
    if backend.engine.alive and paused is not None:
        state, reason = "paused_rate_limit", paused
    return _json(
        {
            "type": "try_again",
            "status": "pending",
            "result": None,
            "request_id": operation.request_id,
            "queue_state": state,
            "queue_state_reason": reason,
        },
        POINTS[dialect].pending_status,
    )


async def answered(
    backend: Backend,
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
            status = POINTS[dialect].failed_status
            failure = {"error": answer.message, "category": answer.category, "detail": answer.message}
            return _json(failure | {"status": "failed", "status_code": status}, status)
    outputs = [answer.output for answer in answers if isinstance(answer, messages.Done)]
    serialized = results.as_protobuf(outputs[0]) if wants_protobuf else None
    if serialized is not None:
        return Response(serialized, media_type=results.PROTOBUF)
    owner = operation.owner
    reply = {name: value for name, value in operation.reply.items() if name != PROMPT_END}
    size = results.size(outputs)
    texts = None
    if "base_model" in parts[0].reply:  # of clients that have no tokenizer
        texts = await backend.offload.in_thread(owner, _texts, outputs, backend, parts[0])
    if size <= _INLINE_BYTES:
        return _json(results.body(outputs, dialect, reply, texts, wrapped))
    encoded = [results.encode(outputs)]
    rendered = await backend.offload.in_process(
        owner, results.rendered, encoded, dialect, reply, texts, wrapped
    )
    return Response(rendered, media_type="application/json")


def _texts(outputs: list[messages.Output], backend: Backend, part: Operation) -> list[str] | None:
    """What the samples say, if the model has a tokenizer."""
    try:
        tokenizer = of_folder(backend.base_model(part.reply["base_model"]).folder)
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
    body: requests.RetrieveFuture, request: Request, backend: BackendOf, owner: Owner, said: Said
) -> Response:
    """Waits until the operation has its answer, at most `long_poll_seconds`, then says to ask again."""
    operation = await _find(backend, owner, body.request_id, said)
    # Polls that came at once, thousands after a restart, do not end at once.
    seconds = backend.settings.long_poll_seconds * random.uniform(0.8, 1.0)
    wants_protobuf = results.PROTOBUF in request.headers.get("accept", "")
    answer = await _poll(backend, operation, seconds, said or operation.dialect, wants_protobuf, False)
    if body.allow_metadata_only and len(answer.body) > METADATA_FIRST_BYTES:
        return _json({"status": "complete_metadata", "response_payload_size": len(answer.body)})
    return answer


@router.post("/retrieve_future/{request_id}", responses=described_as(responses.PolledByPath))
async def retrieve_future_of_path(request_id: str, backend: BackendOf, owner: Owner, said: Said) -> Response:
    """As the other one, at once; the result is also under `result`."""
    operation = await _find(backend, owner, request_id, said)
    seconds = min(AT_ONCE_SECONDS, backend.settings.long_poll_seconds)
    return await _poll(backend, operation, seconds, said or operation.dialect, False, True)


async def _find(backend: Backend, owner: str, request_id: str, said: Dialect | None) -> Operation:
    """Raises Gone, or NotFound for what is none of the caller's requests, where the dialect tells the two
    apart."""
    operation = await backend.operations.find(owner, request_id)
    if operation is not None:
        return operation
    message = f"unknown request {request_id[:192]!r}: it was never accepted, or its answer has expired"
    unknown = POINTS[said or "tinkercloud"].unknown_status == NotFound.status
    if unknown and not await backend.operations.has_expired(owner, request_id):
        raise NotFound(message)
    raise Gone(message)


async def _poll(
    backend: Backend,
    operation: Operation,
    seconds: float,
    dialect: Dialect,
    wants_protobuf: bool,
    wrapped: bool,
) -> Response:
    parts = await backend.operations.parts(operation)
    until = time.monotonic() + seconds
    for part in parts:
        if part.answer is None and not backend.stopped:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(part.finished.wait(), max(0.0, until - time.monotonic()))
        if part.answer is None:
            return _pending(backend, operation, dialect)
    return await answered(backend, operation, parts, dialect, wants_protobuf, wrapped)


@router.post("/cleanup_futures", responses=described_as(responses.CleanedFutures))
async def cleanup_futures(body: requests.CleanupFutures, backend: BackendOf, owner: Owner) -> dict[str, Any]:
    """Forgets the answers that the caller was given so long ago. What is pending stays."""
    before = time.time() - 3600 * body.max_age_hours
    cleaned = await backend.operations.forget_answers(owner, before)
    return {
        "cleaned_count": cleaned,
        "futures_cleaned": cleaned,
        "message": f"the answers of {cleaned} requests are forgotten",
    }


@router.post("/retrieve_futures", responses=described_as(responses.SampleCompletions))
async def retrieve_futures(
    body: requests.RetrieveFutures, backend: BackendOf, owner: Owner
) -> dict[str, Any]:
    """Waits for the first answer to a sample of the sampling session, as `retrieve_future` for one request.

    What the client says it has retrieved may be forgotten; here answers stay as long as all others.
    """
    sampler = await backend.samplers.find(owner, body.target.sampling_session_id)
    patience = backend.settings.long_poll_seconds * random.uniform(0.8, 1.0)
    seconds = patience if body.timeout is None else min(patience, body.timeout)
    answered, cursor = await backend.completions.poll(
        sampler.session_id,
        sampler.id,
        body.target.cloned_sampler_id,
        body.prev_cursor,
        0.0 if backend.stopped else seconds,
    )
    if not answered and backend.stopped:
        raise Unavailable("the server stops")  # which clients ask again after a second
    completions = [
        {"state": "failed" if each.failed else "finished", "request_id": each.request_id} for each in answered
    ]
    return {"completions": completions, "cursor": cursor}


@router.post("/cancel_future", responses=described_as(responses.CancelledFuture))
async def cancel_future(body: requests.CancelFuture, backend: BackendOf, owner: Owner) -> dict[str, str]:
    """Samples can be cancelled; training operations, whose successors count on them, cannot."""
    operation = await backend.operations.find(owner, body.request_id)
    if operation is not None and operation.kind == "sample" and operation.answer is None:
        backend.operations.cancel(operation)
    return {"type": "cancel_future"}
