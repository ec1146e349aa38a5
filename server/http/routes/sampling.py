"""Samples: asked for, and polled or waited for."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ...dialect import Dialect
from ...operations.provenance import sequence_id
from ...wire import responses
from ...wire import sampling as wire
from ..api_samples import ApiSamples
from ..bodies import BodyRoute
from ..dependencies import Owner, Said, described_as, future
from ..operation_answers import OperationAnswers
from ..prompts import while_connected
from ..provided import Provided
from ..served_samples import ServedSamples

router = APIRouter(prefix="/api/v1", tags=["sampling"], route_class=BodyRoute)


@router.post("/asample", responses=described_as(responses.SampleFuture))
async def asample(
    body: wire.Sample, api_samples: Provided[ApiSamples], owner: Owner, said: Said
) -> dict[str, Any]:
    operation = await api_samples.submit(owner, body, said)
    ids = [sequence_id(operation.request_id, index) for index in range(body.num_samples)]
    return future(operation) | {"sample_sequence_ids": ids}


@router.post("/sample", response_model=None, responses=described_as(responses.Sampled))
async def sample(
    body: wire.SampleNow,
    request: Request,
    api_samples: Provided[ApiSamples],
    served: Provided[ServedSamples],
    answers: Provided[OperationAnswers],
    owner: Owner,
    said: Said,
    wait: bool | None = None,
) -> Response | dict[str, Any]:
    """Of one `prompt`: the samples, when they are there. Of `prompts`: a request to poll. `wait` chooses.
    Closing the connection cancels samples that the request waits for, unless they are numbered: sending
    those again finds them."""
    if body.prompts is None if wait is None else wait:
        waiting = _sample_and_wait(body, api_samples, served, answers, owner, said)
        return await while_connected(request, waiting)
    async with served.of_request(owner) as samples:
        operation = await api_samples.submit_all(owner, body, samples, said)
        samples.disown()
    return future(operation)


async def _sample_and_wait(
    body: wire.SampleNow,
    api_samples: ApiSamples,
    served: ServedSamples,
    answers: OperationAnswers,
    owner: str,
    said: Dialect | None,
) -> Response:
    async with served.of_request(owner) as samples:
        operation = await api_samples.submit_all(owner, body, samples, said)
        if body.sampling_session_id is not None and body.seq_id is not None:  # it is numbered
            samples.disown()
        return await answers.when_answered(operation, said or operation.dialect)
