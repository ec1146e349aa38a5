"""Samples that are waited for in the request that asks for them: those of the inference routes.

Samples that live no longer than the HTTP request that waits for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from fastapi.responses import StreamingResponse

from ...engine import messages
from ..base_models import BaseModels
from ..errors import ApiError, BadRequest, Unavailable
from ..models.submits import SampleSubmits
from ..offload import Offload
from ..operations.operation import Operation
from ..operations.sample_streams import SampleStream, SampleStreams
from ..wire.results import size
from ..wire.sampling import ModelInput, longest_prompt, prompt_tokens
from .sample_targets import ServedModel


class RequestSamples:
    """The samples of one HTTP request. Leaving the context cancels those that have no answer yet."""

    def __init__(self, submits: SampleSubmits, owner: str):
        self._submits = submits
        self.owner = owner
        self._owned: list[Operation] = []

    async def __aenter__(self) -> RequestSamples:
        return self

    async def __aexit__(self, *_error: object) -> None:
        for operation in self._owned:
            self._submits.cancel(operation)

    async def own(self, submitting: Coroutine[Any, Any, Operation]) -> Operation:
        """Await a submit and own its sample, also when the request ends before the submit does."""
        submitted = asyncio.ensure_future(submitting)
        try:
            operation = await asyncio.shield(submitted)
        except asyncio.CancelledError:
            submitted.add_done_callback(self._cancel_late)
            raise
        self._owned.append(operation)
        return operation

    def disown(self) -> None:
        """Let the samples outlive the request; streams cancel their own (`ServedSamples.drawn`)."""
        self._owned.clear()

    def _cancel_late(self, submitted: asyncio.Task[Operation]) -> None:
        if not submitted.cancelled() and submitted.exception() is None:
            self._submits.cancel(submitted.result())


T = TypeVar("T")

_INLINE_BYTES = 16 << 10  # of tokens and log-probs


class SampleFailed(ApiError):
    """The engine's fault, not the request's."""

    status = 500
    category = "server"


@dataclass(frozen=True)
class Asked:
    """`topk`, `prompt_topk`: how many of the most likely tokens are wanted at each token drawn, and of the
    prompt. `targets`: tokens to score in the prompt. `params.max_tokens` may be 0. `echo`: whether the answer
    begins with the prompt, which is `prompt_text` if it was not sent as tokens. `prompt_field`,
    `count_field`: where the request has the prompt and the number of samples, for its errors."""

    model: ServedModel
    prompt: list[int]
    params: messages.SamplingParams
    num_samples: int = 1
    topk: int = 0
    prompt_logprobs: bool = False
    prompt_topk: int = 0
    targets: messages.PromptCells | None = None
    stream: bool = False
    echo: bool = False
    prompt_text: str | None = None
    prompt_field: str = "prompt"
    count_field: str = "n"

    @property
    def draws_nothing(self) -> bool:
        return self.params.max_tokens == 0


@dataclass(frozen=True)
class Running:
    asked: Asked
    operation: Operation
    stream: SampleStream | None


class ServedSamples:
    """Submits the samples of the inference routes. A request may ask for at most `max_samples` of a
    prompt."""

    def __init__(
        self,
        submits: SampleSubmits,
        streams: SampleStreams,
        base_models: BaseModels,
        offload: Offload,
        max_samples: int,
        keep_alive_seconds: float,
    ):
        self._submits = submits
        self._streams = streams
        self._base_models = base_models
        self._offload = offload
        self._max_samples = max_samples
        self._keep_alive_seconds = keep_alive_seconds

    def of_request(self, owner: str) -> RequestSamples:
        """The samples of one HTTP request."""
        return RequestSamples(self._submits, owner)

    async def submit(self, samples: RequestSamples, asked: Sequence[Asked]) -> list[Running]:
        """Accept all of these samples or none: a wrong one is refused before any is accepted. Raises
        ApiError."""
        running: list[Running] = []
        for each, sample in [(each, self._sample(samples.owner, each)) for each in asked]:
            operation = await samples.own(self._submits.submit(samples.owner, sample))
            running.append(Running(each, operation, self._streams.of(operation.request_id)))
        return running

    async def drawn(
        self, running: Sequence[Running]
    ) -> AsyncIterator[tuple[int, messages.Drawn | messages.SampleOutput]]:
        """Yield what is drawn for each, by its place in `running`, and at last its answer. Raises as
        `answers` does; then, or when the caller stops listening, all that are not answered are cancelled."""
        # Of one part: what nobody has read yet waits in the streams, which are bounded in bytes.
        parts: asyncio.Queue[tuple[int, messages.Drawn | Exception | None]] = asyncio.Queue(1)

        async def follow(place: int, each: Running) -> None:
            assert each.stream is not None
            try:
                async for part in each.stream.until_answered(each.operation):
                    await parts.put((place, part))
            except Exception as error:
                await parts.put((place, error))
            else:
                await parts.put((place, None))

        following = [asyncio.ensure_future(follow(place, each)) for place, each in enumerate(running)]
        try:
            unanswered = len(running)
            while unanswered:
                place, part = await parts.get()
                if isinstance(part, Exception):
                    raise part
                if part is None:
                    unanswered -= 1
                    yield place, _output(running[place])
                elif not running[place].asked.draws_nothing:
                    yield place, part
        finally:
            for task in following:
                task.cancel()
            for each in running:
                self._submits.cancel(each.operation)

    def streamed(self, events: AsyncGenerator[bytes]) -> StreamingResponse:
        """Return server-sent events as a response that is never silent for long."""
        return StreamingResponse(
            _with_keep_alives(events, self._keep_alive_seconds), media_type="text/event-stream"
        )

    async def written(
        self, owner: str, outputs: Sequence[messages.SampleOutput], write: Callable[[], T]
    ) -> T:
        """Return what `write` makes of the answers; in a thread where that takes long."""
        if size(outputs) <= _INLINE_BYTES:
            return write()
        return await self._offload.in_thread(owner, write)

    def _sample(self, owner: str, asked: Asked) -> messages.Sample:
        """Raises ApiError for one that cannot be served."""
        if asked.num_samples > self._max_samples:
            raise BadRequest(
                f"{asked.count_field}: {asked.num_samples} is over the limit of {self._max_samples}"
            )
        model = self._base_models.named(asked.model.sampler.base_model)
        tokens = ModelInput(tokens=asked.prompt)
        max_tokens = 1 if asked.draws_nothing else asked.params.max_tokens
        longest = longest_prompt(model.max_sequence_length, max_tokens)
        prompt = prompt_tokens(tokens, model.vocab_size, longest, asked.prompt_field)
        sample = messages.Sample(
            request_id="",
            sampler=asked.model.sampler,
            prompt=prompt,
            # The engine draws at least one token.
            num_samples=1 if asked.draws_nothing else asked.num_samples,
            params=msgspec.structs.replace(asked.params, max_tokens=1)
            if asked.draws_nothing
            else asked.params,
            prompt_logprobs=asked.prompt_logprobs,
            topk_prompt_logprobs=asked.prompt_topk,
            topk_sample_logprobs=asked.topk,
            prompt_targets=asked.targets,
            stream=asked.stream,
        )
        self._submits.check(owner, sample)
        return sample


async def _with_keep_alives(events: AsyncGenerator[bytes], seconds: float) -> AsyncGenerator[bytes]:
    """Yield the events, and a comment whenever none has come for `seconds`."""
    coming = asyncio.ensure_future(anext(events, None))
    try:
        while True:
            if not (await asyncio.wait((coming,), timeout=seconds))[0]:
                yield b": the samples are under way\n\n"
                continue
            if (event := coming.result()) is None:
                return
            yield event
            coming = asyncio.ensure_future(anext(events, None))
    finally:
        coming.cancel()
        await asyncio.wait((coming,))
        await events.aclose()


async def answers(running: Sequence[Running]) -> list[messages.SampleOutput]:
    """Wait for all, or until one fails. Raises BadRequest or SampleFailed for a sample that failed,
    Unavailable at a stop."""
    waiting = [asyncio.ensure_future(_answer(each)) for each in running]
    try:
        return await asyncio.gather(*waiting)
    finally:
        for each in waiting:
            each.cancel()


async def _answer(running: Running) -> messages.SampleOutput:
    await running.operation.finished.wait()
    return _output(running)


def _output(running: Running) -> messages.SampleOutput:
    match running.operation.answer:
        case messages.Done(output=messages.SampleOutput() as output):
            if running.asked.draws_nothing:
                # The likely ones are those of the token that would have come next.
                nothing = messages.SampledSequence(b"", b"", "length", output.sequences[0].topk)
                return msgspec.structs.replace(output, sequences=[nothing] * running.asked.num_samples)
            return output
        case messages.Failed(message=message, category="user"):
            raise BadRequest(message)
        case messages.Failed(message=message):
            raise SampleFailed(message)
    raise Unavailable("the server stops")
