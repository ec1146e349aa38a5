"""Answers of accepted operations, by long poll."""

from __future__ import annotations

import random
import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ...errors import Unavailable
from ...models.samplers import Samplers
from ...operations.operations import Operations
from ...operations.sample_streams import Completions
from ...settings import Settings
from ...wire import requests, responses, results
from ..bodies import BodyRoute
from ..dependencies import Owner, Provided, RequestedDialect, described_as
from ..operation_answers import OperationAnswers, json_response

router = APIRouter(prefix="/api/v1", tags=["futures"], route_class=BodyRoute)

# Answers over this size are announced first, where the client allows it, so that it can bound its memory.
METADATA_FIRST_BYTES = 1 << 20
AT_ONCE_SECONDS = 1.0


@router.post("/retrieve_future", responses=described_as(responses.Polled, binary=results.PROTOBUF))
async def retrieve_future(
    body: requests.RetrieveFuture,
    request: Request,
    answers: Provided[OperationAnswers],
    owner: Owner,
    requested: RequestedDialect,
) -> Response:
    """Wait for the operation's answer, at most `long_poll_seconds`; then tell the client to ask again."""
    wants_protobuf = results.PROTOBUF in request.headers.get("accept", "")
    answer = await answers.poll(owner, body.request_id, requested, wants_protobuf)
    if body.allow_metadata_only and len(answer.body) > METADATA_FIRST_BYTES:
        return json_response({"status": "complete_metadata", "response_payload_size": len(answer.body)})
    return answer


@router.post("/retrieve_future/{request_id}", responses=described_as(responses.PolledByPath))
async def retrieve_future_of_path(
    request_id: str, answers: Provided[OperationAnswers], owner: Owner, requested: RequestedDialect
) -> Response:
    """Answer as `retrieve_future` does, but at once, and with the result also under `result`."""
    return await answers.poll(owner, request_id, requested, most_seconds=AT_ONCE_SECONDS, wrapped=True)


@router.post("/cleanup_futures", responses=described_as(responses.CleanedFutures))
async def cleanup_futures(
    body: requests.CleanupFutures, operations: Provided[Operations], owner: Owner
) -> dict[str, Any]:
    """Drop the answers that the caller was given so long ago. Pending operations stay."""
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
