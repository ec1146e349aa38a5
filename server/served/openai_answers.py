"""Samples as OpenAI's completions and chat completions, whole or as a stream of chunks."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import orjson

from ...engine import messages
from ..backend import Backend
from ..errors import ApiError, internal_error
from ..openai_errors import error_object
from ..wire.sampled import likely_of, logprobs_of, tokens_of
from . import served_samples
from .sampled_text import SampledText
from .served_samples import Running
from .tokenizer import ChatTokenizer

Likely = list[list[tuple[int, float]]]


@dataclass
class Answers:
    """What both have in common. `model`: as the client calls it."""

    model: str
    text: ChatTokenizer
    with_logprobs: bool
    with_usage: bool  # at the end of a stream
    prefix: str = ""
    kind: str = ""
    chunk_kind: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def choice(self, index: int, text: str, reason: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        raise NotImplementedError

    def delta(
        self, index: int, text: str, reason: str | None, logprobs: dict[str, Any] | None, first: bool
    ) -> dict[str, Any]:
        raise NotImplementedError

    def logprobs(
        self, tokens: list[int], logprobs: list[float], likely: Likely, offset: int
    ) -> dict[str, Any]:
        """`offset`: the number of characters before the first of these tokens."""
        raise NotImplementedError

    def whole(self, answered: list[tuple[Running, messages.SampleOutput]]) -> dict[str, Any]:
        choices: list[dict[str, Any]] = []
        for running, output in answered:
            for sequence in output.sequences:
                text = self._sampled_text(running).whole(tokens_of(sequence.tokens), sequence.stop_reason)
                logprobs = _Told(self).logprobs(sequence)
                choices.append(self.choice(len(choices), text, sequence.stop_reason, logprobs))
        body = self._body(answered[0][0], self.kind, choices)
        return body | {"usage": _usage(answered)}

    async def events(self, backend: Backend, running: list[Running]) -> AsyncIterator[bytes]:
        """The choices of the first prompt come first in the numbering, then those of the next."""
        first_choice = list(itertools.accumulate((each.asked.num_samples for each in running), initial=0))
        texts = [self._sampled_text(each) for each in running for _ in range(each.asked.num_samples)]
        told = [_Told(self) for _ in texts]
        answered: list[tuple[Running, messages.SampleOutput]] = []
        try:
            async for place, part in served_samples.drawn(backend, running):
                if isinstance(part, messages.SampleOutput):
                    answered.append((running[place], part))
                    for index, sequence in enumerate(part.sequences, first_choice[place]):
                        text = texts[index].end(tokens_of(sequence.tokens), sequence.stop_reason)
                        first, logprobs = told[index].count == 0, told[index].logprobs(sequence)
                        delta = self.delta(index, text, sequence.stop_reason, logprobs, first)
                        yield self._event(running[0], [delta])
                    continue
                index = first_choice[place] + part.index
                if part.begin + len(part.tokens) // 4 <= told[index].count:  # an engine began it again
                    continue
                text = texts[index].add(part.begin, tokens_of(part.tokens))
                first, logprobs = told[index].count == 0, told[index].logprobs(part, part.begin)
                yield self._event(running[0], [self.delta(index, text, None, logprobs, first)])
            if self.with_usage:
                yield self._event(running[0], [], _usage(answered))
        except ApiError as error:
            yield _error_event(error.status, error.message, error.code)
        except Exception as error:
            yield _error_event(500, internal_error("a stream of samples", error))
        yield b"data: [DONE]\n\n"

    def _sampled_text(self, running: Running) -> SampledText:
        params = running.asked.params
        return SampledText(self.text, params.stop_strings, params.stop_tokens or [])

    def _body(self, running: Running, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.prefix + running.operation.request_id.removeprefix("req_"),
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "metadata": {"weight_version": running.asked.model.version},
        }

    def _event(
        self, running: Running, choices: list[dict[str, Any]], usage: dict[str, int] | None = None
    ) -> bytes:
        body = self._body(running, self.chunk_kind, choices)
        return _data(body | ({"usage": usage} if self.with_usage else {}))


@dataclass
class CompletionAnswers(Answers):
    prefix: str = "cmpl-"
    kind: str = "text_completion"
    chunk_kind: str = "text_completion"

    def choice(self, index: int, text: str, reason: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"index": index, "text": text, "finish_reason": reason, "logprobs": logprobs}

    def delta(
        self, index: int, text: str, reason: str | None, logprobs: dict[str, Any] | None, first: bool
    ) -> dict[str, Any]:
        return {"index": index, "text": text, "finish_reason": reason, "logprobs": logprobs}

    def logprobs(
        self, tokens: list[int], logprobs: list[float], likely: Likely, offset: int
    ) -> dict[str, Any]:
        written = [self.text.token(token) for token in tokens]
        offsets = [*itertools.accumulate(map(len, written[:-1]), initial=offset)][: len(written)]
        top = [{self.text.token(token): value for token, value in row} for row in likely]
        return {
            "tokens": written,
            "token_logprobs": logprobs,
            "top_logprobs": top or None,
            "text_offset": offsets,
        }


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

    def logprobs(
        self, tokens: list[int], logprobs: list[float], likely: Likely, offset: int
    ) -> dict[str, Any]:
        content = [
            self._entry(token, value)
            | {"top_logprobs": [self._entry(*pair) for pair in (likely[at] if likely else [])]}
            for at, (token, value) in enumerate(zip(tokens, logprobs, strict=True))
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        written = self.text.token(token)
        return {"token": written, "logprob": logprob, "bytes": list(written.encode())}


@dataclass
class _Told:
    """What a stream has said of one choice: the log-probs of how many tokens, and of how many characters."""

    answers: Answers
    count: int = 0
    characters: int = 0

    def logprobs(
        self, part: messages.SampledSequence | messages.Drawn, begin: int = 0
    ) -> dict[str, Any] | None:
        """The log-probs of the tokens that were not told of before; `part` begins with the `begin`-th."""
        new = self.count - begin
        tokens = tokens_of(part.tokens)[new:]
        self.count += len(tokens)
        if not self.answers.with_logprobs:
            return None
        offset = self.characters
        self.characters += sum(len(self.answers.text.token(token)) for token in tokens)
        values, likely = logprobs_of(part.logprobs)[new:], likely_of(part.topk)[new:]
        return self.answers.logprobs(tokens, values, likely, offset)


def _usage(answered: list[tuple[Running, messages.SampleOutput]]) -> dict[str, int]:
    prompt = sum(len(running.asked.prompt) for running, _ in answered)
    drawn = sum(len(sequence.tokens) // 4 for _, output in answered for sequence in output.sequences)
    return {"prompt_tokens": prompt, "completion_tokens": drawn, "total_tokens": prompt + drawn}


def _error_event(status: int, message: str, code: str | None = None) -> bytes:
    return _data({"error": error_object(status, message, code=code)})


def _data(body: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"
