"""Answers of accepted operations, by long poll."""

from __future__ import annotations

import asyncio
import contextlib
import random
import uuid
from typing import Any

import orjson
from fastapi import APIRouter, Request
from fastapi.responses import Response

from ...engine import messages
from ..errors import Gone, Unavailable
from ..operation import Operation
from ..wire import requests, results
from . import Backend, BackendOf, Owner

router = APIRouter(prefix="/api/v1", tags=["futures"])

# Answers over this size are announced first, where the client allows it, so that it can bound its memory.
METADATA_FIRST_BYTES = 1 << 20


def _json(body: dict[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(body), status, media_type="application/json")


def _pending(backend: Backend, operation: Operation) -> Response:
    """The engine's state, or that the tenant has reached a quota."""
    state, reason = "active" if backend.engine.alive else "paused_capacity", backend.engine.text
    paused = backend.admission.paused(operation.owner)
    if backend.engine.alive and paused is not None:
        state, reason = "paused_rate_limit", paused
    return _json(
        {
            "type": "try_again",
            "request_id": operation.request_id,
            "queue_state": state,
            "queue_state_reason": reason,
        },
        408,
    )


def _body(operation: Operation, wants_protobuf: bool) -> tuple[bytes, str]:
    answer = operation.answer
    if isinstance(answer, messages.Failed):
        return orjson.dumps({"error": answer.message, "category": answer.category}), "application/json"
    assert isinstance(answer, messages.Done)
    serialized = results.as_protobuf(answer.output) if wants_protobuf else None
    if serialized is not None:
        return serialized, results.PROTOBUF
    return orjson.dumps(results.as_json(answer.output) | operation.reply), "application/json"


@router.post("/retrieve_future")
async def retrieve_future(
    body: requests.RetrieveFuture, request: Request, backend: BackendOf, owner: Owner
) -> Response:
    """Waits until the operation has its answer, at most `long_poll_seconds`, then 408 to be asked again."""
    operation = await backend.operations.find(owner, body.request_id)
    if operation is None:
        # Not 404: for clients that is the end, while on 410 they sample again under a new number.
        raise Gone(f"unknown request {body.request_id!r}: it was never accepted, or its answer has expired")
    if operation.answer is None and not backend.stopped:
        with contextlib.suppress(TimeoutError):
            # Polls that came at once, thousands after a restart, do not end at once.
            patience = backend.settings.long_poll_seconds * random.uniform(0.8, 1.0)
            await asyncio.wait_for(operation.finished.wait(), patience)
    if operation.answer is None:
        return _pending(backend, operation)
    content, media_type = _body(operation, results.PROTOBUF in request.headers.get("accept", ""))
    if body.allow_metadata_only and len(content) > METADATA_FIRST_BYTES:
        return _json({"status": "complete_metadata", "response_payload_size": len(content)})
    return Response(content, media_type=media_type)


@router.post("/retrieve_futures")
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
        sampler.id, body.target.cloned_sampler_id, body.prev_cursor, 0.0 if backend.stopped else seconds
    )
    if not answered and backend.stopped:
        raise Unavailable("the server stops")  # which clients ask again after a second
    completions = [
        {"state": "failed" if each.failed else "finished", "request_id": each.request_id} for each in answered
    ]
    return {"completions": completions, "cursor": cursor}


@router.post("/cancel_future")
async def cancel_future(body: requests.CancelFuture, backend: BackendOf, owner: Owner) -> dict[str, str]:
    """Samples can be cancelled; training operations, whose successors count on them, cannot."""
    operation = await backend.operations.find(owner, body.request_id)
    if operation is not None and operation.kind == "sample" and operation.answer is None:
        cancel = messages.Cancel(f"cancel-{uuid.uuid4().hex}", operation.request_id)
        if not backend.engine.send(messages.encode(cancel)):
            backend.operations.fail([operation], "cancelled")
    return {"type": "cancel_future"}
