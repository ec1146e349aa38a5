"""Samples as OpenAI's completions and chat completions, whole or as a stream of chunks."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import orjson

from ...engine import messages
from ..backend import Backend
from ..errors import ApiError
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

    def logprobs(self, tokens: list[int], logprobs: list[float], likely: Likely) -> dict[str, Any]:
        raise NotImplementedError

    def whole(self, answered: list[tuple[Running, messages.SampleOutput]]) -> dict[str, Any]:
        choices: list[dict[str, Any]] = []
        for running, output in answered:
            for sequence in output.sequences:
                tokens = tokens_of(sequence.tokens)
                text = self._sampled_text(running).whole(tokens, sequence.stop_reason)
                logprobs = None
                if self.with_logprobs:
                    logprobs = self.logprobs(tokens, logprobs_of(sequence.logprobs), likely_of(sequence.topk))
                choices.append(self.choice(len(choices), text, sequence.stop_reason, logprobs))
        body = self._body(answered[0][0], self.kind, choices)
        return body | {"usage": _usage(answered)}

    async def events(self, backend: Backend, running: Running) -> AsyncIterator[bytes]:
        texts = [self._sampled_text(running) for _ in range(running.asked.num_samples)]
        seen: defaultdict[int, int] = defaultdict(int)  # tokens told of, by sequence
        try:
            async for part in served_samples.drawn(backend, running):
                if isinstance(part, messages.SampleOutput):
                    for index, sequence in enumerate(part.sequences):
                        tokens, begin = tokens_of(sequence.tokens), seen[index]
                        text = texts[index].end(tokens, sequence.stop_reason)
                        found = self._logprobs_from(begin, sequence.tokens, sequence.logprobs, sequence.topk)
                        delta = self.delta(index, text, sequence.stop_reason, found, begin == 0)
                        yield self._event(running, [delta])
                    if self.with_usage:
                        yield self._event(running, [], _usage([(running, part)]))
                    continue
                index, behind = part.index, seen[part.index] - part.begin
                text = texts[index].add(part.begin, tokens_of(part.tokens))
                count = len(part.tokens) // 4
                if behind >= count:  # of an engine that began it again
                    continue
                found = self._logprobs_from(behind, part.tokens, part.logprobs, part.topk)
                delta = self.delta(index, text, None, found, seen[index] == 0)
                seen[index] = part.begin + count
                yield self._event(running, [delta])
        except ApiError as error:
            yield _data({"error": {"message": error.message, "code": error.status}})
        yield b"data: [DONE]\n\n"

    def _logprobs_from(
        self, begin: int, tokens: bytes, logprobs: bytes, topk: messages.TopK | None
    ) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        return self.logprobs(
            tokens_of(tokens)[begin:], logprobs_of(logprobs)[begin:], likely_of(topk)[begin:]
        )

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

    def logprobs(self, tokens: list[int], logprobs: list[float], likely: Likely) -> dict[str, Any]:
        written = [self.text.token(token) for token in tokens]
        offsets = [sum(map(len, written[:at])) for at in range(len(written))]
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

    def logprobs(self, tokens: list[int], logprobs: list[float], likely: Likely) -> dict[str, Any]:
        content = [
            self._entry(token, value)
            | {"top_logprobs": [self._entry(*pair) for pair in (likely[at] if likely else [])]}
            for at, (token, value) in enumerate(zip(tokens, logprobs, strict=True))
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        written = self.text.token(token)
        return {"token": written, "logprob": logprob, "bytes": list(written.encode())}


def _usage(answered: list[tuple[Running, messages.SampleOutput]]) -> dict[str, int]:
    prompt = sum(len(running.asked.prompt) for running, _ in answered)
    drawn = sum(len(sequence.tokens) // 4 for _, output in answered for sequence in output.sequences)
    return {"prompt_tokens": prompt, "completion_tokens": drawn, "total_tokens": prompt + drawn}


def _data(body: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"
