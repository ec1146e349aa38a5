"""Samples that requests ask for: prompts as tokens, the submit, and the wait for the answer.

`ApiSamples` serves the routes `asample` and `sample`, `ServedSamples` those of OpenAI and SGLang, whose
samples live no longer than the HTTP request that waits for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import orjson
from fastapi import Request
from fastapi.responses import StreamingResponse

from ...ckpt.tokenizer_files import end_tokens
from ...engine import messages
from ..base_models import BaseModel
from ..dialect import DIALECT_RULES, Dialect
from ..errors import ApiError, BadRequest, ClientGone, ContextTooLong, Unavailable
from ..ledger.operations import SampleNumber
from ..models.submits import SampleSubmits
from ..offload import Offload
from ..operations.operation import Operation, Submission
from ..operations.operations import Operations
from ..operations.sample_streams import Completions, SampleStream, SampleStreams
from ..text import ChatTokenizer, SampledText, of_folder, written_conversation
from ..wire import sample_requests as wire
from ..wire.results import size, tokens_of
from ..wire.sample_requests import ModelInput, longest_prompt, prompt_tokens
from .sample_targets import SampleTargets, ServedModel, Target

T = TypeVar("T")

_INLINE_CHARACTERS = 4096  # tokenized within a millisecond or two
_CHARACTERS_PER_TOKEN = 8  # more than texts have on average; runs of spaces may have more
_GROWTH = 4
_INLINE_BYTES = 16 << 10  # of tokens and log-probs
_CONTEXT = 8  # tokens of a prompt that its samples are decoded after
PROMPT_END = "prompt_end"
"""In the reply of a sample: the last tokens of its prompt, which its text goes on from. Not for clients."""


@dataclass(frozen=True)
class NamedModel:
    """The model that a request names, with what turns prompts into its tokens, away from the event loop."""

    served: ServedModel
    base: BaseModel
    tokenizer: ChatTokenizer
    offload: Offload
    owner: str

    async def tokens(self, prompt: str | list[int]) -> list[int]:
        """Return the tokens of a text; tokens stay as they are. Raises ContextTooLong, or BadRequest."""
        if not isinstance(prompt, str):
            return prompt
        if len(prompt) <= _INLINE_CHARACTERS:
            return self.tokenizer.encode(prompt)
        limit = self.base.max_sequence_length
        return await self.offload.in_thread(self.owner, tokens_within, self.tokenizer.encode, prompt, limit)

    async def conversation_tokens(self, turns: list[dict[str, Any]], /, **variables: Any) -> list[int]:
        """Return the tokens of a conversation. Raises BadRequest if it is too long, or if the chat template
        does not take it."""

        def tokens() -> list[int]:
            text = written_conversation(self.tokenizer, turns, **variables)
            return tokens_within(
                self.tokenizer.encode_written, text, self.base.max_sequence_length, "messages"
            )

        return await self.offload.in_thread(self.owner, tokens)


def tokens_within(
    encode: Callable[[str], list[int]], text: str, limit: int, where: str = "prompt"
) -> list[int]:
    """Return the tokens of a text. Raises ContextTooLong if there are more than `limit` of them.

    Of a very long text the beginning is tokenized first, which mostly is too long already.
    """
    beginning = _CHARACTERS_PER_TOKEN * (limit + 1)
    while beginning < len(text):
        # Without the cut, the last few tokens might be merged into one.
        if len(encode(text[:beginning])) > limit + _CHARACTERS_PER_TOKEN * _GROWTH:
            raise ContextTooLong(
                f"{where}: a text of {len(text)} characters has more tokens than the model's limit of {limit}"
            )
        beginning *= _GROWTH
    return encode(text)


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns, or cancel it when the client closes the connection.

    The body must have been read before. Raises ClientGone.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone("the client closed its connection")
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class RequestSamples:
    """Owns the samples of one HTTP request. Leaving the context cancels those that have no answer yet."""

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


class SampleFailed(ApiError):
    """The engine failed, not the request."""

    status = 500
    category = "server"


@dataclass(frozen=True)
class SampleRequest:
    """The samples of one prompt that a request asks for.

    `topk`, `prompt_topk`: how many of the most likely tokens to return at each token drawn, and at each of
    the prompt. `targets`: tokens to score in the prompt. `params.max_tokens` may be 0. `echo`: begin the
    answer with the prompt, which is `prompt_text` if it was not sent as tokens. `keep_stop`,
    `skip_special_tokens`: how to write the text. `prompt_field`, `count_field`: which fields of the request
    errors name.
    """

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
    keep_stop: bool = False
    skip_special_tokens: bool = True
    prompt_field: str = "prompt"
    count_field: str = "n"

    @property
    def draws_nothing(self) -> bool:
        return self.params.max_tokens == 0

    def text(self, tokenizer: ChatTokenizer) -> SampledText:
        """Return the empty text of one sample."""
        return SampledText(
            tokenizer,
            self.params.stop_strings,
            self.params.stop_tokens or [],
            self.keep_stop,
            self.skip_special_tokens,
            self.prompt,
        )


@dataclass(frozen=True)
class Running:
    """A submitted request for samples. `stream` has the tokens before the answer, if they were asked for."""

    request: SampleRequest
    operation: Operation
    stream: SampleStream | None


@dataclass(frozen=True)
class ServedSamples:
    """Submits the samples of OpenAI's routes and of `/generate`, at most `max_samples` of a prompt.

    A stream that has nothing to send says so every `keep_alive_seconds`.
    """

    submits: SampleSubmits
    streams: SampleStreams
    targets: SampleTargets
    offload: Offload
    max_samples: int
    keep_alive_seconds: float

    async def named(self, owner: str, name: str | None) -> NamedModel:
        """Find a model by any name that `SampleTargets.named` knows. Raises NotFound."""
        served = await self.targets.named(owner, name)
        base = self.targets.base_models.named(served.sampler.base_model)
        text = await asyncio.to_thread(of_folder, base.folder)
        return NamedModel(served, base, text, self.offload, owner)

    def of_request(self, owner: str) -> RequestSamples:
        """Return the owner of one HTTP request's samples, which has none yet."""
        return RequestSamples(self.submits, owner)

    async def submit(self, samples: RequestSamples, requests: Sequence[SampleRequest]) -> list[Running]:
        """Accept all of these, or none: a wrong one is refused before any is accepted. Raises ApiError."""
        running: list[Running] = []
        for each, sample in [(each, self._sample(samples.owner, each)) for each in requests]:
            operation = await samples.own(self.submits.submit(samples.owner, sample))
            running.append(Running(each, operation, self.streams.of(operation.request_id)))
        return running

    async def drawn(
        self, running: Sequence[Running]
    ) -> AsyncIterator[tuple[int, messages.Drawn | messages.SampleOutput]]:
        """Yield the tokens that are drawn for each, by its place in `running`, and at last its answer.

        Raises as `outputs_of` does. Then, or when the caller stops listening, samples without an answer are
        cancelled.
        """
        # One part long: tokens that nobody has read yet wait in the streams, which are bounded in bytes.
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
                elif not running[place].request.draws_nothing:
                    yield place, part
        finally:
            for task in following:
                task.cancel()
            for each in running:
                self.submits.cancel(each.operation)

    def streamed(self, events: AsyncGenerator[bytes]) -> StreamingResponse:
        """Return server-sent events as a response that is never silent for long."""
        return StreamingResponse(
            _with_keep_alives(events, self.keep_alive_seconds), media_type="text/event-stream"
        )

    async def written(
        self, owner: str, outputs: Sequence[messages.SampleOutput], write: Callable[[], T]
    ) -> T:
        """Return what `write` returns. It runs in a thread if writing these outputs takes long."""
        if size(outputs) <= _INLINE_BYTES:
            return write()
        return await self.offload.in_thread(owner, write)

    def _sample(self, owner: str, request: SampleRequest) -> messages.Sample:
        """Return the engine's message. Raises ApiError for a request that cannot be served."""
        params, count = request.params, request.num_samples
        if request.draws_nothing:  # the engine draws at least one token
            params = msgspec.structs.replace(params, max_tokens=1)
        _check_count(count, self.max_samples, request.count_field)
        model = self.targets.base_models.named(request.model.sampler.base_model)
        longest = longest_prompt(model.max_sequence_length, params.max_tokens)
        given = ModelInput(tokens=request.prompt)
        sample = messages.Sample(
            request_id="",
            sampler=request.model.sampler,
            prompt=prompt_tokens(given, model.vocab_size, longest, request.prompt_field),
            num_samples=1 if request.draws_nothing else count,
            params=params,
            prompt_logprobs=request.prompt_logprobs,
            topk_prompt_logprobs=request.prompt_topk,
            topk_sample_logprobs=request.topk,
            prompt_targets=request.targets,
            stream=request.stream,
        )
        self.submits.check(owner, sample)
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


async def outputs_of(running: Sequence[Running]) -> list[messages.SampleOutput]:
    """Wait for all answers, or until one fails.

    Raises BadRequest or SampleFailed for a sample that failed, Unavailable when the server stops.
    """

    async def answer(each: Running) -> messages.SampleOutput:
        await each.operation.finished.wait()
        return _output(each)

    waiting = [asyncio.ensure_future(answer(each)) for each in running]
    try:
        return await asyncio.gather(*waiting)
    finally:
        for each in waiting:
            each.cancel()


def _output(running: Running) -> messages.SampleOutput:
    match running.operation.answer:
        case messages.Done(output=messages.SampleOutput() as output):
            if running.request.draws_nothing:
                # The likely tokens are those that would have come next.
                nothing = messages.SampledSequence(b"", b"", "length", output.sequences[0].topk)
                return msgspec.structs.replace(output, sequences=[nothing] * running.request.num_samples)
            return output
        case messages.Failed(message=message, category="user"):
            raise BadRequest(message)
        case messages.Failed(message=message):
            raise SampleFailed(message)
    raise Unavailable("the server stops")


def event(body: dict[str, Any]) -> bytes:
    """Return a server-sent event."""
    return b"data: " + orjson.dumps(body) + b"\n\n"


def _check_count(count: int, limit: int, field: str) -> None:
    if count > limit:
        raise BadRequest(f"{field}: {count} is over the limit of {limit}")


@dataclass(frozen=True)
class ApiSamples:
    """Submits the samples of `asample` and `sample`, at most `max_samples` of a prompt."""

    targets: SampleTargets
    submits: SampleSubmits
    operations: Operations
    completions: Completions
    max_samples: int

    async def submit(self, owner: str, body: wire.Sample, dialect: Dialect) -> Operation:
        """Accept the samples of one prompt. Raises ApiError."""
        target = await self.targets.target(owner, body)
        return await self._submit(owner, body, body.prompt, target, body.seq_id, dialect)

    async def submit_all(
        self, owner: str, body: wire.SampleNow, samples: RequestSamples, dialect: Dialect
    ) -> Operation:
        """Accept the samples of all prompts, or none of them. Raises ApiError."""
        target = await self.targets.target(owner, body)
        if body.prompt is not None:
            return await samples.own(self._submit(owner, body, body.prompt, target, body.seq_id, dialect))
        prompts = [ModelInput.model_construct(tokens=tokens) for tokens in body.prompts or []]
        parts = [
            await samples.own(self._submit(owner, body, each, target, None, dialect)) for each in prompts
        ]
        reply = {"parts": [operation.request_id for operation in parts]}
        return await self.operations.accept(Submission.done_at_once(owner, "samples", reply, dialect))

    async def _submit(
        self,
        owner: str,
        body: wire.SampleFields,
        given: ModelInput,
        target: Target,
        seq_id: int | None,
        dialect: Dialect,
    ) -> Operation:
        model = self.targets.base_models.named(target.ref.base_model)
        _check_count(body.num_samples, self.max_samples, "num_samples")
        longest = longest_prompt(model.max_sequence_length, body.sampling_params.max_tokens)
        prompt = prompt_tokens(given, model.vocab_size, longest)
        ends = await asyncio.to_thread(end_tokens, model.folder) if DIALECT_RULES[dialect].stops_add else ()
        cells = body.target_prompt_logprobs
        sample = messages.Sample(
            request_id="",
            sampler=target.ref,
            prompt=prompt,
            num_samples=body.num_samples,
            params=body.sampling_params.message(dialect, ends),
            prompt_logprobs=bool(body.prompt_logprobs),
            topk_prompt_logprobs=body.topk_prompt_logprobs,
            topk_sample_logprobs=body.topk_sample_logprobs,
            prompt_logprobs_last_n=body.prompt_logprobs_last_n,
            prompt_targets=None if cells is None else cells.message(),
            prompt_alternatives=body.prompt_alt_tokens_k or 0,
            record_routing=body.record_routing,
        )
        number: SampleNumber | None = None
        if target.session is not None and seq_id is not None:
            number = SampleNumber(target.session.session_id, target.session.id, seq_id)
        reply: dict[str, Any] = {}
        if dialect != "tinker":  # the SDK has a tokenizer; others get the text of the samples
            reply = {"base_model": model.name, PROMPT_END: tokens_of(prompt[-4 * _CONTEXT :])}
        operation = await self.submits.submit(owner, sample, number, reply, dialect)
        if number is not None:
            self.completions.accepted(number.sampler_id, number.number, operation)
        return operation
