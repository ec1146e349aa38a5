"""Samples that are waited for in the request that asks for them: those of the inference routes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from ...engine import messages
from ..backend import Backend
from ..errors import ApiError, BadRequest, Unavailable
from ..operations.operation import Operation
from ..wire.model_input import ModelInput, prompt_tokens
from . import sample_submits
from .request_samples import RequestSamples, cancel
from .sample_streams import SampleStream
from .served_models import ServedModel


class SampleFailed(ApiError):
    """The engine's fault, not the request's."""

    status = 500
    category = "server"


@dataclass(frozen=True)
class Asked:
    """`topk`: the most likely tokens wanted where each token was drawn."""

    model: ServedModel
    prompt: list[int]
    params: messages.SamplingParams
    num_samples: int = 1
    topk: int = 0
    prompt_logprobs: bool = False
    stream: bool = False


@dataclass(frozen=True)
class Running:
    asked: Asked
    operation: Operation
    stream: SampleStream | None


async def submit(samples: RequestSamples, asked: Asked) -> Running:
    """Accepted as any other sample is. Raises ApiError."""
    backend, owner = samples.backend, samples.owner
    if asked.num_samples > backend.settings.max_samples:
        raise BadRequest(f"n: {asked.num_samples} is over the limit of {backend.settings.max_samples}")
    model = backend.base_model(asked.model.sampler.base_model)
    tokens = ModelInput(tokens=asked.prompt)
    prompt = prompt_tokens(tokens, model.vocab_size, model.max_sequence_length - 1)
    sample = messages.Sample(
        request_id="",
        sampler=asked.model.sampler,
        prompt=prompt,
        num_samples=asked.num_samples,
        params=asked.params,
        prompt_logprobs=asked.prompt_logprobs,
        topk_sample_logprobs=asked.topk,
        stream=asked.stream,
    )
    operation = await samples.own(sample_submits.submit(backend, owner, sample))
    return Running(asked, operation, backend.streams.of(operation.request_id))


async def answer(running: Running) -> messages.SampleOutput:
    """Raises BadRequest or SampleFailed for a sample that failed, Unavailable at a stop."""
    await running.operation.finished.wait()
    return _output(running.operation)


async def drawn(backend: Backend, running: Running) -> AsyncIterator[messages.Drawn | messages.SampleOutput]:
    """What is drawn, and at last the answer, which raises as `answer` does. To stop listening cancels it."""
    assert running.stream is not None
    operation = running.operation
    try:
        async for part in running.stream.until_answered(operation):
            yield part
        yield _output(operation)
    finally:
        cancel(backend, operation)


def _output(operation: Operation) -> messages.SampleOutput:
    match operation.answer:
        case messages.Done(output=messages.SampleOutput() as output):
            return output
        case messages.Failed(message=message, category="user"):
            raise BadRequest(message)
        case messages.Failed(message=message):
            raise SampleFailed(message)
    raise Unavailable("the server stops")
