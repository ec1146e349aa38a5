"""Samples, and the sampling sessions that they are drawn from."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ...dialect import Dialect
from ...errors import BadRequest
from ...ledger import tenancy
from ...ledger.ledger import Ledger
from ...models.losses import sequence_id
from ...models.samplers import Sampler, Samplers, number_of
from ...models.sessions import Sessions
from ...operations.operation import Submission
from ...operations.operations import Operations
from ...plugins.sglang.sampling import Divergence
from ...wire import requests, responses
from ...wire import sample_requests as wire
from ..bodies import BodyRoute
from ..dependencies import Owner, Provided, RequestedDialect, described_as, future
from ..sample_targets import SampleTargets, Weights
from ..samples import ApiSamples, ServedSamples, while_connected
from .futures import OperationAnswers, json_response

router = APIRouter(prefix="/api/v1", tags=["sampling"], route_class=BodyRoute)


@router.post("/asample", response_model=dict[str, Any], responses=described_as(responses.SampleFuture))
async def asample(
    body: wire.Sample, api_samples: Provided[ApiSamples], owner: Owner, requested: RequestedDialect
) -> Response:
    """Submit samples of one prompt, for a poll to answer."""
    operation = await api_samples.submit(owner, body, requested or "tinkercloud")
    ids = [sequence_id(operation.request_id, index) for index in range(body.num_samples)]
    return json_response(future(operation) | {"sample_sequence_ids": ids})


@router.post("/sample", response_model=None, responses=described_as(responses.Sampled))
async def sample(
    body: wire.SampleNow,
    request: Request,
    api_samples: Provided[ApiSamples],
    served: Provided[ServedSamples],
    answers: Provided[OperationAnswers],
    owner: Owner,
    requested: RequestedDialect,
    wait: bool | None = None,
) -> Response | dict[str, Any]:
    """Draw samples of one `prompt` and wait for them, or submit those of several `prompts` for a poll; `wait`
    chooses otherwise. Closing the connection cancels samples that the request waits for, unless they are
    numbered: then sending the request again finds them."""
    dialect = requested or "tinkercloud"
    waits = body.prompts is None if wait is None else wait
    is_numbered = body.sampling_session_id is not None and body.seq_id is not None

    async def answer() -> Response | dict[str, Any]:
        async with served.of_request(owner) as samples:
            operation = await api_samples.submit_all(owner, body, samples, dialect)
            if is_numbered or not waits:
                samples.disown()
            return await answers.when_answered(operation, dialect) if waits else future(operation)

    return await (while_connected(request, answer()) if waits else answer())


@router.post("/create_sampling_session", responses=described_as(responses.CreatedSamplingSession))
async def create_sampling_session(
    body: wire.CreateSamplingSession,
    ledger: Provided[Ledger],
    sessions: Provided[Sessions],
    targets: Provided[SampleTargets],
    owner: Owner,
    requested: RequestedDialect,
) -> dict[str, Any]:
    """Open a sampling session: in a session under a number, or for a sampler checkpoint alone."""
    sampler = await _create(ledger, sessions, targets, owner, body, requested)
    return {"type": "create_sampling_session", "success": True} | _described(sampler, body.model_path)


@router.post("/create_sampling_client", responses=described_as(responses.CreatedSamplingClient))
async def create_sampling_client(
    body: wire.CreateSamplingClient,
    ledger: Provided[Ledger],
    operations: Provided[Operations],
    sessions: Provided[Sessions],
    targets: Provided[SampleTargets],
    owner: Owner,
    requested: RequestedDialect,
) -> dict[str, Any]:
    """Open a sampling session as create_sampling_session does. The request that it answers with is done at
    once."""
    sampler = await _create(ledger, sessions, targets, owner, body, requested)
    reply = {"type": "create_sampling_client", "status": "ready", "sampling_client_id": sampler.id}
    reply |= _described(sampler, body.model_path)
    if body.sampling_params is not None:
        reply["warning_message"] = "sampling_params: send them with each sample; a client keeps none"
    submission = Submission.done_at_once(owner, "create_sampling_client", reply, requested or "tinkercloud")
    return reply | future(await operations.accept(submission))


def _described(sampler: Sampler, model_path: str | None) -> dict[str, Any]:
    """Describe a sampler for its client. `lora_name` is what SGLang's `/generate` calls the adapter."""
    name = (sampler.model_path or "").rpartition("/")[2]
    return {
        "sampling_session_id": sampler.id,
        "model_path": model_path,
        "base_model": sampler.base_model,
        "lora_name": name,
        "message": f"{name or sampler.base_model} can be sampled",
    }


async def _create(
    ledger: Ledger,
    sessions: Sessions,
    targets: SampleTargets,
    owner: str,
    body: wire.CreateSamplingSession,
    requested: Dialect | None,
) -> Sampler:
    session_id, number = body.session_id, body.sampling_session_seq_id
    found = await targets.weights(owner, body.base_model, body.model_path, body.model_id)
    if (session_id is None) != (number is None):
        raise BadRequest("session_id and sampling_session_seq_id come together")
    if session_id is not None:
        session_id = await sessions.of_client(owner, session_id, requested)
    which: int | str = "base" if number is None else number
    if number is None and found.run_id is not None:
        which = number_of(found.run_id, (found.path or "").rpartition("/")[2])
    session_id = session_id or await _session_of(ledger, sessions, owner, found)
    return await targets.samplers.create(
        owner, session_id, which, found.base_model, found.path, found.directory, body.sampling_engine
    )


async def _session_of(ledger: Ledger, sessions: Sessions, owner: str, found: Weights) -> str:
    """Return the session of the caller's model that the weights belong to, or a new one."""
    if found.run_id is not None:
        run_id = found.run_id
        row = await ledger.read(tenancy.find_model, run_id)
        if row is not None and row.owner == owner:
            return row.session_id
    return await sessions.create(owner, {"tags": [], "user_metadata": {}})


@router.post("/join_sampling_session", responses=described_as(responses.JoinedSamplingSession))
async def join_sampling_session(
    body: requests.JoinSamplingSession, ledger: Provided[Ledger], samplers: Provided[Samplers], owner: Owner
) -> dict[str, Any]:
    """Return a number for a copy of a sampling client that was pickled, or made from a handle."""
    sampler = await samplers.find(owner, body.sampling_session_id)
    number = await ledger.write(tenancy.add_copy, sampler.id)
    return {"type": "join_sampling_session", "client_counter": number}


@router.get("/samplers/{sampler_id}", responses=described_as(responses.SamplerInfo))
async def get_sampler(
    sampler_id: str, samplers: Provided[Samplers], divergence: Provided[Divergence], owner: Owner
) -> dict[str, Any]:
    """Describe a sampler. `metrics`: how SGLang's log-probs compare to the engine's; null before any were
    compared."""
    sampler = await samplers.find(owner, sampler_id)
    described = {"sampler_id": sampler.id, "base_model": sampler.base_model, "model_path": sampler.model_path}
    compared = divergence.of(sampler.base_model, sampler.directory)
    return described | {"sampling_engine": sampler.engine, "metrics": compared}
