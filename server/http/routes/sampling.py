"""Samples: asked for, and polled or waited for."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ....ckpt.tokenizer_files import end_tokens
from ....engine import messages
from ...dialect import POINTS, Dialect
from ...errors import BadRequest, Unavailable
from ...ledger.samples import SampleNumber
from ...models import sample_submits
from ...operations.operation import Operation, Submission
from ...operations.provenance import sequence_id
from ...wire import responses
from ...wire import sampling as wire
from ...wire.model_input import ModelInput, longest_prompt, prompt_tokens
from ...wire.sampled import tokens_of
from ..bodies import BodyRoute
from ..dependencies import Backend, BackendOf, Owner, Said, described_as, future
from ..hang_ups import while_connected
from ..request_samples import RequestSamples
from ..sample_targets import Target, target
from .futures import PROMPT_END, answered

router = APIRouter(prefix="/api/v1", tags=["sampling"], route_class=BodyRoute)

_CONTEXT = 8  # tokens of a prompt that its samples are decoded after


@router.post("/asample", responses=described_as(responses.SampleFuture))
async def asample(body: wire.Sample, backend: BackendOf, owner: Owner, said: Said) -> dict[str, Any]:
    found = await target(backend, owner, body)
    operation = await _submit(body, body.prompt, found, body.seq_id, backend, owner, said)
    ids = [sequence_id(operation.request_id, index) for index in range(body.num_samples)]
    return future(operation) | {"sample_sequence_ids": ids}


@router.post("/sample", response_model=None, responses=described_as(responses.Sampled))
async def sample(
    body: wire.SampleNow,
    request: Request,
    backend: BackendOf,
    owner: Owner,
    said: Said,
    wait: bool | None = None,
) -> Response | dict[str, Any]:
    """Of one `prompt`: the samples, when they are there. Of `prompts`: a request to poll. `wait` chooses.
    Closing the connection cancels samples that the request waits for, unless they are numbered: sending
    those again finds them."""
    if body.prompts is None if wait is None else wait:
        return await while_connected(request, _sample_and_wait(body, backend, owner, said))
    async with RequestSamples(backend, owner) as samples:
        operation = await _sample_now(body, samples, said)
        samples.disown()
    return future(operation)


async def _sample_and_wait(
    body: wire.SampleNow, backend: Backend, owner: str, said: Dialect | None
) -> Response:
    async with RequestSamples(backend, owner) as samples:
        operation = await _sample_now(body, samples, said)
        if _is_numbered(body):
            samples.disown()
        parts = await backend.operations.parts(operation)
        for part in parts:
            await part.finished.wait()
            if part.answer is None:
                raise Unavailable("the server stops")
        return await answered(backend, operation, parts, said or operation.dialect)


async def _sample_now(body: wire.SampleNow, samples: RequestSamples, said: Dialect | None) -> Operation:
    """All prompts are accepted, or none."""
    backend, owner = samples.backend, samples.owner
    found = await target(backend, owner, body)
    if body.prompt is not None:
        return await samples.own(_submit(body, body.prompt, found, body.seq_id, backend, owner, said))
    inputs = [ModelInput.model_construct(tokens=tokens) for tokens in body.prompts or []]
    each = [await samples.own(_submit(body, prompt, found, None, backend, owner, said)) for prompt in inputs]
    return await _all(each, backend, owner, said)


def _is_numbered(body: wire.SampleFields) -> bool:
    return body.sampling_session_id is not None and body.seq_id is not None


async def _all(each: list[Operation], backend: Backend, owner: str, said: Dialect | None) -> Operation:
    """One request for the samples of all."""
    return await backend.operations.accept(
        Submission(
            owner,
            "samples",
            None,
            None,
            {"parts": [operation.request_id for operation in each]},
            also=lambda _connection, request_id: messages.Done(request_id, messages.Nothing()),
            dialect=said or "tinkercloud",
        )
    )


async def _submit(
    body: wire.SampleFields,
    given: ModelInput,
    found: Target,
    seq_id: int | None,
    backend: Backend,
    owner: str,
    said: Dialect | None,
) -> Operation:
    sampler = found.ref
    model = backend.base_model(sampler.base_model)
    if body.num_samples > backend.settings.max_samples:
        raise BadRequest(
            f"num_samples: {body.num_samples} is over the limit of {backend.settings.max_samples}"
        )
    longest = longest_prompt(model.max_sequence_length, body.sampling_params.max_tokens)
    prompt = prompt_tokens(given, model.vocab_size, longest)
    targets = None if body.target_prompt_logprobs is None else body.target_prompt_logprobs.message()
    number: SampleNumber | None = None
    if found.session is not None and seq_id is not None:
        number = SampleNumber(found.session.session_id, found.session.id, seq_id)
    dialect = said or "tinkercloud"
    ends = await asyncio.to_thread(end_tokens, model.folder) if POINTS[dialect].stops_add else ()
    params = body.sampling_params.message(dialect, ends)

    sample = messages.Sample(
        request_id="",
        sampler=sampler,
        prompt=prompt,
        num_samples=body.num_samples,
        params=params,
        prompt_logprobs=bool(body.prompt_logprobs),
        topk_prompt_logprobs=body.topk_prompt_logprobs,
        topk_sample_logprobs=body.topk_sample_logprobs,
        prompt_logprobs_last_n=body.prompt_logprobs_last_n,
        prompt_targets=targets,
        prompt_alternatives=body.prompt_alt_tokens_k or 0,
    )
    # The SDK has the tokenizer; others are told what the tokens say.
    reply: dict[str, Any] = {}
    if dialect != "tinker":
        reply = {"base_model": sampler.base_model, PROMPT_END: tokens_of(prompt[-4 * _CONTEXT :])}
    operation = await sample_submits.submit(backend, owner, sample, number, reply, dialect)
    if number is not None:
        backend.completions.accepted(number.sampler_id, number.number, operation)
    return operation
