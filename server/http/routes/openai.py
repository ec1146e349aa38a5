"""OpenAI's completions and chat completions, of any base model or sampler: the routes, and their answers."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import orjson
from fastapi import APIRouter, Request
from fastapi.responses import Response

from ....engine import messages
from ...errors import ApiError, internal_error
from ...text import ChatTokenizer
from ...wire import openai as wire
from ...wire.results import likely_of, logprobs_of, prompt_logprobs_of, tokens_of
from ..bodies import BodyRoute
from ..dependencies import Owner, Provided, described_as
from ..errors import error_object
from ..samples import Running, SampleRequest, ServedSamples, event, outputs_of, while_connected

Likely = list[tuple[int, float]]
"""The most likely tokens at one position, and their log-probs."""


@dataclass(frozen=True)
class Scored:
    """A token of a choice, its log-prob, and the most likely tokens in its place, if they were asked for. The
    first token of a prompt has neither: nothing predicts it."""

    token: int
    logprob: float | None
    likely: Likely | None


@dataclass
class Answers:
    """Writes answers; the two kinds of completions differ in the shapes. `model`: the client's name for it.
    `num_choices`: how many of a prompt's samples are returned, the likeliest ones."""

    model: str
    text: ChatTokenizer
    with_logprobs: bool
    with_usage: bool  # at the end of a stream
    num_choices: int
    prefix: str = ""
    kind: str = ""
    chunk_kind: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def choice(self, index: int, text: str, reason: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        """Return a sample as a part of a whole answer: unless the kind says otherwise, as in a stream."""
        return self.delta(index, text, reason, logprobs, True)

    def delta(
        self, index: int, text: str, reason: str | None, logprobs: dict[str, Any] | None, first: bool
    ) -> dict[str, Any]:
        """Return new text of a sample as a part of a stream."""
        raise NotImplementedError

    def logprobs(self, scored: list[Scored], offset: int) -> dict[str, Any]:
        """Return the log-probs of tokens. `offset`: the number of characters before the first of them."""
        raise NotImplementedError

    def lengths(self, tokens: list[int]) -> list[int]:
        """Return how many characters each token adds to the text."""
        return self.text.lengths(tokens)

    def whole(self, answered: list[tuple[Running, messages.SampleOutput]]) -> bytes:
        """Return the answer as JSON. It is written choice by choice, because writing holds the interpreter's
        lock."""
        choices: list[orjson.Fragment] = []
        for running, output in answered:
            for sequence in _likeliest(output.sequences, self.num_choices):
                choice = _Choice(self, running.request)
                text, logprobs = choice.end(output, sequence)
                made = self.choice(len(choices), text, sequence.stop_reason, logprobs)
                choices.append(orjson.Fragment(orjson.dumps(made)))
        body = self._body(answered[0][0], self.kind, choices)
        return orjson.dumps(body | {"usage": _usage(answered)})

    async def events(self, served: ServedSamples, running: list[Running]) -> AsyncGenerator[bytes]:
        """Yield the events of a stream. Choices are numbered prompt by prompt."""
        choices = [_Choice(self, each.request) for each in running for _ in range(self.num_choices)]
        answered: list[tuple[Running, messages.SampleOutput]] = []
        try:
            async for place, part in served.drawn(running):
                if isinstance(part, messages.SampleOutput):
                    answered.append((running[place], part))
                    for index, sequence in enumerate(part.sequences, place * self.num_choices):
                        last = partial(self._last_event, running[0], choices, index, part, sequence)
                        yield await served.written(running[0].operation.owner, [part], last)
                    continue
                index = place * self.num_choices + part.index
                first, more = choices[index].is_new, choices[index].add(part)
                if more is not None:
                    yield self._event(running[0], [self.delta(index, more[0], None, more[1], first)])
            if self.with_usage:
                yield self._event(running[0], [], _usage(answered))
        except ApiError as error:
            yield _error_event(error.status, error.message, error.code)
        except Exception as error:
            yield _error_event(500, internal_error("a stream of samples", error))
        yield b"data: [DONE]\n\n"

    def _last_event(
        self,
        running: Running,
        choices: list[_Choice],
        index: int,
        output: messages.SampleOutput,
        sequence: messages.SampledSequence,
    ) -> bytes:
        first = choices[index].is_new
        text, logprobs = choices[index].end(output, sequence)
        return self._event(running, [self.delta(index, text, sequence.stop_reason, logprobs, first)])

    def _body(self, running: Running, kind: str, choices: Sequence[Any]) -> dict[str, Any]:
        return {
            "id": self.prefix + running.operation.request_id.removeprefix("req_"),
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "metadata": {"weight_version": running.request.model.version},
        }

    def _event(
        self, running: Running, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None
    ) -> bytes:
        body = self._body(running, self.chunk_kind, choices)
        return event(body | ({"usage": usage} if self.with_usage else {}))


@dataclass
class CompletionAnswers(Answers):
    prefix: str = "cmpl-"
    kind: str = "text_completion"
    chunk_kind: str = "text_completion"

    def delta(
        self, index: int, text: str, reason: str | None, logprobs: dict[str, Any] | None, first: bool
    ) -> dict[str, Any]:
        return {"index": index, "text": text, "finish_reason": reason, "logprobs": logprobs}

    def logprobs(self, scored: list[Scored], offset: int) -> dict[str, Any]:
        tokens = [each.token for each in scored]
        offsets = [*itertools.accumulate(self.lengths(tokens), initial=offset)]
        top = [None if each.likely is None else self._by_text(each.likely) for each in scored]
        return {
            "tokens": [self.text.token(token) for token in tokens],
            "token_logprobs": [each.logprob for each in scored],
            "top_logprobs": top if any(top) else None,
            "text_offset": offsets[: len(tokens)],
        }

    def _by_text(self, likely: Likely) -> dict[str, float]:
        """Return log-probs by the tokens' texts. If texts are equal, the likeliest token has the text, and
        the others have their ids."""
        found: dict[str, float] = {}
        for token, value in likely:  # the likeliest first
            text = self.text.token(token)
            found[f"token_id:{token}" if text in found else text] = value
        return found


@dataclass
class ChatAnswers(Answers):
    prefix: str = "chatcmpl-"
    kind: str = "chat.completion"
    chunk_kind: str = "chat.completion.chunk"

    def choice(self, index: int, text: str, reason: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "finish_reason": reason, "logprobs": logprobs}

    def delta(
        self, index: int, text: str, reason: str | None, logprobs: dict[str, Any] | None, first: bool
    ) -> dict[str, Any]:
        delta = ({"role": "assistant"} if first else {}) | {"content": text}
        return {"index": index, "delta": delta, "finish_reason": reason, "logprobs": logprobs}

    def logprobs(self, scored: list[Scored], offset: int) -> dict[str, Any]:
        content = [
            self._entry(each.token, each.logprob)
            | {"top_logprobs": [self._entry(*pair) for pair in each.likely or []]}
            for each in scored
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        written = self.text.token(token).removeprefix("bytes:")
        return {"token": written, "logprob": logprob, "bytes": list(self.text.token_bytes(token))}


class _Choice:
    """The part of one choice that was sent already."""

    def __init__(self, answers: Answers, request: SampleRequest):
        self._answers = answers
        self._request = request
        self._text = request.text(answers.text)
        self._tokens = 0
        self._characters = 0
        self.is_new = True

    def add(self, part: messages.Drawn) -> tuple[str, dict[str, Any] | None] | None:
        """Take in new tokens. Return the new text and log-probs, or None if nothing is new."""
        if self._request.prompt_logprobs:  # which are there only at the end, and come first
            return None
        if part.begin + len(part.tokens) // 4 <= self._tokens:  # an engine began it again
            return None
        text = self._text.add(part.begin, tokens_of(part.tokens))
        return self._echo() + text, self._logprobs(part, part.begin)

    def end(
        self, output: messages.SampleOutput, sequence: messages.SampledSequence
    ) -> tuple[str, dict[str, Any] | None]:
        """Return the rest of the text and of the log-probs."""
        text = self._text.end(tokens_of(sequence.tokens), sequence.stop_reason)
        prompt: list[Scored] = []
        if self._request.prompt_logprobs:
            values, likely = prompt_logprobs_of(output), likely_of(output.topk_prompt_logprobs)
            prompt = _scored(self._request.prompt, values, likely)
        return self._echo() + text, self._logprobs(sequence, 0, prompt)

    def _echo(self) -> str:
        """Return the prompt's text if it begins the answer and this is the first part."""
        is_first, self.is_new = self.is_new, False
        if not is_first or not self._request.echo:
            return ""
        given = self._request.prompt_text
        echo = self._answers.text.decode(self._request.prompt) if given is None else given
        self._characters += len(echo)
        return echo

    def _logprobs(
        self, part: messages.SampledSequence | messages.Drawn, begin: int, prompt: Sequence[Scored] = ()
    ) -> dict[str, Any] | None:
        """Return the log-probs of tokens that were not sent yet. `part` starts with the `begin`-th token."""
        new = self._tokens - begin
        tokens = tokens_of(part.tokens)[new:]
        self._tokens += len(tokens)
        if not self._answers.with_logprobs:
            return None
        likely = likely_of(part.topk)[new : new + len(tokens)]
        scored = _scored(tokens, logprobs_of(part.logprobs)[new:], likely)
        found = self._answers.logprobs(scored, self._characters)
        self._characters += sum(self._answers.lengths(tokens))
        if not prompt:
            return found
        before = self._answers.logprobs([*prompt], 0)
        top = (before["top_logprobs"] or [None] * len(prompt)) + (
            found["top_logprobs"] or [None] * len(tokens)
        )
        return {name: before[name] + found[name] for name in before if name != "top_logprobs"} | {
            "top_logprobs": top if any(top) else None
        }


def _scored(
    tokens: Sequence[int], logprobs: Sequence[float | None], likely: Sequence[Likely]
) -> list[Scored]:
    rows: Sequence[Likely | None] = likely or [None] * len(tokens)
    return [
        Scored(token, logprob, None if logprob is None else row)
        for token, logprob, row in zip(tokens, logprobs, rows, strict=True)
    ]


def _likeliest(sequences: list[messages.SampledSequence], count: int) -> list[messages.SampledSequence]:
    """Return the sequences with the highest mean log-prob; if all are kept, in the order in which they were
    drawn."""
    if count >= len(sequences):
        return sequences

    def score(sequence: messages.SampledSequence) -> float:
        values = logprobs_of(sequence.logprobs)
        return sum(values) / len(values) if values else 0.0

    return sorted(sequences, key=score, reverse=True)[:count]


def _usage(answered: list[tuple[Running, messages.SampleOutput]]) -> dict[str, Any]:
    prompt = sum(len(running.request.prompt) for running, _ in answered)
    drawn = sum(len(sequence.tokens) // 4 for _, output in answered for sequence in output.sequences)
    cached = sum(output.prompt_cache_hit_tokens for _, output in answered)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": drawn,
        "total_tokens": prompt + drawn,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _error_event(status: int, message: str, code: str | None = None) -> bytes:
    return event({"error": error_object(status, message, code=code)})


router = APIRouter(prefix="/v1", tags=["inference"], route_class=BodyRoute)


@router.post(
    "/completions",
    response_model=None,
    responses=described_as(wire.TextCompletion, events=wire.TextCompletionChunk),
)
async def completions(
    body: wire.Completions, request: Request, served: Provided[ServedSamples], owner: Owner
) -> Response:
    """Complete one prompt or several, with `n` samples each. With `stream` the answer is server-sent events.
    Closing the connection cancels the samples."""
    return await while_connected(request, _completions(body, served, owner))


async def _completions(body: wire.Completions, served: ServedSamples, owner: str) -> Response:
    model = await served.named(owner, body.model)
    scores_prompt = body.echo and body.logprobs is not None
    requests = [
        SampleRequest(
            model.served,
            await model.tokens(given),
            body.params(model.tokenizer.end_tokens),
            num_samples=body.num_samples,
            topk=body.logprobs or 0,
            prompt_logprobs=scores_prompt,
            prompt_topk=(body.logprobs or 0) if scores_prompt else 0,
            stream=body.stream,
            echo=body.echo,
            prompt_text=given if isinstance(given, str) else None,
            keep_stop=body.no_stop_trim,
            skip_special_tokens=body.skip_special_tokens,
            prompt_field="prompt" if len(body.prompts) == 1 else f"prompt[{place}]",
            count_field="n" if body.best_of is None else "best_of",
        )
        for place, given in enumerate(body.prompts)
    ]
    with_logprobs = body.logprobs is not None
    answers = CompletionAnswers(body.model, model.tokenizer, with_logprobs, body.with_usage, body.n)
    return await _answered(served, owner, answers, requests)


@router.post(
    "/chat/completions",
    response_model=None,
    responses=described_as(wire.ChatCompletion, events=wire.ChatCompletionChunk),
)
async def chat_completions(
    body: wire.ChatCompletions, request: Request, served: Provided[ServedSamples], owner: Owner
) -> Response:
    """Draw the next turn of a conversation, as the model's chat template writes it. With `stream` the answer
    is server-sent events. Closing the connection cancels the samples."""
    return await while_connected(request, _chat_completions(body, served, owner))


async def _chat_completions(body: wire.ChatCompletions, served: ServedSamples, owner: str) -> Response:
    model = await served.named(owner, body.model)
    turns = [message.turn() for message in body.messages]
    request = SampleRequest(
        model.served,
        await model.conversation_tokens(turns, **body.template_variables),
        body.params(model.tokenizer.end_tokens),
        num_samples=body.n,
        topk=body.top_logprobs,
        stream=body.stream,
        keep_stop=body.no_stop_trim,
        skip_special_tokens=body.skip_special_tokens,
        prompt_field="messages",
    )
    answers = ChatAnswers(body.model, model.tokenizer, body.logprobs, body.with_usage, body.n)
    return await _answered(served, owner, answers, [request])


async def _answered(
    served: ServedSamples, owner: str, answers: Answers, requests: list[SampleRequest]
) -> Response:
    async with served.of_request(owner) as samples:
        running = await served.submit(samples, requests)
        if requests[0].stream:
            samples.disown()
            return served.streamed(answers.events(served, running))
        outputs = await outputs_of(running)
    answered = list(zip(running, outputs, strict=True))
    whole = await served.written(owner, outputs, lambda: answers.whole(answered))
    return Response(whole, media_type="application/json")
