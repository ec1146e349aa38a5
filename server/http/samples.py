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
from fastapi import Request
from fastapi.responses import StreamingResponse

from ...ckpt.tokenizer_files import end_tokens
from ...engine import messages
from ..base_models import BaseModels
from ..dialect import POINTS, Dialect
from ..errors import ApiError, BadRequest, ClientGone, ContextTooLong, Unavailable
from ..ledger.operations import SampleNumber
from ..models.submits import SampleSubmits
from ..offload import Offload
from ..operations.operation import Operation, Submission
from ..operations.operations import Operations
from ..operations.sample_streams import Completions, SampleStream, SampleStreams
from ..text.sampled_text import written_conversation
from ..text.tokenizer import ChatTokenizer
from ..wire import sampling as wire
from ..wire.results import size, tokens_of
from ..wire.sampling import ModelInput, longest_prompt, prompt_tokens
from .operation_answers import PROMPT_END
from .sample_targets import SampleTargets, ServedModel, Target

T = TypeVar("T")

_INLINE_CHARACTERS = 4096  # tokenized within a millisecond or two
_CHARACTERS_PER_TOKEN = 8  # more than texts have, on the average; runs of spaces may
_GROWTH = 4


class Prompts:
    """The prompts of one request as tokens, of a model whose context has `limit` of them."""

    def __init__(self, offload: Offload, owner: str, tokenizer: ChatTokenizer, limit: int):
        self._offload = offload
        self._owner = owner
        self._tokenizer = tokenizer
        self._limit = limit

    async def of(self, prompt: str | list[int]) -> list[int]:
        """Tokens stay as they are. Raises ContextTooLong, or BadRequest for a text that cannot be written."""
        if not isinstance(prompt, str):
            return prompt
        if len(prompt) <= _INLINE_CHARACTERS:
            return self._tokenizer.encode(prompt)
        return await self._offload.in_thread(
            self._owner, tokens_within, self._tokenizer.encode, prompt, self._limit
        )

    async def of_conversation(self, turns: list[dict[str, Any]], /, **variables: Any) -> list[int]:
        """Raises BadRequest for one that is too long, or that the chat template does not take."""

        def tokens() -> list[int]:
            text = written_conversation(self._tokenizer, turns, **variables)
            return tokens_within(self._tokenizer.encode_written, text, self._limit, "messages")

        return await self._offload.in_thread(self._owner, tokens)


def tokens_within(
    encode: Callable[[str], list[int]], text: str, limit: int, where: str = "prompt"
) -> list[int]:
    """The text's tokens. Raises ContextTooLong where they are more than `limit`, and soon for a very long
    text: its beginning is tokenized first, and mostly is too long already."""
    beginning = _CHARACTERS_PER_TOKEN * (limit + 1)
    while beginning < len(text):
        # The last token may go on behind the cut, and then be a few that are merged there.
        if len(encode(text[:beginning])) > limit + _CHARACTERS_PER_TOKEN * _GROWTH:
            raise ContextTooLong(
                f"{where}: a text of {len(text)} characters has more tokens than the model's limit of {limit}"
            )
        beginning *= _GROWTH
    return encode(text)


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns, or cancel it when the client closes the connection.

    The body has to be read before. Raises ClientGone.
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
        `outputs_of` does; then, or when the caller stops listening, all that are not answered are cancelled.
        """
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


async def outputs_of(running: Sequence[Running]) -> list[messages.SampleOutput]:
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


_CONTEXT = 8  # tokens of a prompt that its samples are decoded after


class ApiSamples:
    """Submits what the bodies of `asample` and `sample` ask for, at most `max_samples` of a prompt."""

    def __init__(
        self,
        base_models: BaseModels,
        targets: SampleTargets,
        submits: SampleSubmits,
        operations: Operations,
        completions: Completions,
        max_samples: int,
    ):
        self._base_models = base_models
        self._targets = targets
        self._submits = submits
        self._operations = operations
        self._completions = completions
        self._max_samples = max_samples

    async def submit(self, owner: str, body: wire.Sample, said: Dialect | None) -> Operation:
        """Accept the samples of one prompt. Raises ApiError."""
        found = await self._targets.target(owner, body)
        return await self._submit(owner, body, body.prompt, found, body.seq_id, said)

    async def submit_all(
        self, owner: str, body: wire.SampleNow, samples: RequestSamples, said: Dialect | None
    ) -> Operation:
        """Accept the samples of all prompts, or none of them. Raises ApiError."""
        found = await self._targets.target(owner, body)
        if body.prompt is not None:
            return await samples.own(self._submit(owner, body, body.prompt, found, body.seq_id, said))
        inputs = [ModelInput.model_construct(tokens=tokens) for tokens in body.prompts or []]
        each = [await samples.own(self._submit(owner, body, prompt, found, None, said)) for prompt in inputs]
        return await self._operations.accept(
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
        self,
        owner: str,
        body: wire.SampleFields,
        given: ModelInput,
        found: Target,
        seq_id: int | None,
        said: Dialect | None,
    ) -> Operation:
        sampler = found.ref
        model = self._base_models.named(sampler.base_model)
        if body.num_samples > self._max_samples:
            raise BadRequest(f"num_samples: {body.num_samples} is over the limit of {self._max_samples}")
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
        operation = await self._submits.submit(owner, sample, number, reply, dialect)
        if number is not None:
            self._completions.accepted(number.sampler_id, number.number, operation)
        return operation
