"""One sequence that an SGLang server draws, until our own rule says that it has ended.

SGLang ends sequences by rules of its own: at the model's end-of-sequence token also where it is no stop, not
at a stop string that was drawn in other tokens than it is written in, and by length rather than by a stop
that comes with the last token. So it is asked to stop where it can, and what counts is the rule that the
embedded sampler has too: a sequence that ended too early goes on from its tokens, with the same weights, and
one that went too far is cut. Either leaves the distribution of its tokens as it is.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ....engine import messages
from .endpoint import EndpointBusy, EndpointRefused


@dataclass(frozen=True)
class Stops:
    """`decode` gives the text of tokens, special ones included; needed where there are `strings`."""

    tokens: frozenset[int]
    strings: tuple[str, ...]
    longest: int  # tokens
    decode: Callable[[list[int]], str] | None = None

    def end(self, tokens: list[int], seen: int = 0) -> tuple[int, Literal["stop", "length"]] | None:
        """How many tokens are the whole sequence, and why it ends there; None: it goes on. A stop wins over
        the length. Its first `seen` tokens are known not to end it."""
        at = next((i + 1 for i in range(seen, len(tokens)) if tokens[i] in self.tokens), None)
        by_text = self._by_text(tokens, seen)
        ends = [each for each in (at, by_text) if each is not None and each <= self.longest]
        if ends:
            return min(ends), "stop"
        return (self.longest, "length") if len(tokens) >= self.longest else None

    def _by_text(self, tokens: list[int], seen: int) -> int | None:
        """With which token a stop string is whole."""
        if not self.strings or self.decode is None or not self._says_stop(tokens):
            return None
        more = range(seen + 1, len(tokens) + 1)
        return more[bisect.bisect_left(more, True, key=lambda count: self._says_stop(tokens[:count]))]

    def _says_stop(self, tokens: list[int]) -> bool:
        assert self.decode is not None
        text = self.decode(tokens)
        return any(string in text for string in self.strings)


@dataclass
class Drawing:
    """`topk`: how many likely tokens are wanted at each. `told`: of its tokens, in a stream."""

    stops: Stops
    prompt: list[int]
    topk: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    reason: Literal["stop", "length"] | None = None
    told: int = 0

    @property
    def remaining(self) -> int:
        return self.stops.longest - len(self.tokens)

    def take(self, answer: dict[str, Any], vocab_size: int) -> None:
        """More tokens. Raises EndpointRefused for what is no sample, EndpointBusy for one that was ended."""
        meta = answer.get("meta_info") or {}
        finish = meta.get("finish_reason") or {}
        if finish.get("type") == "abort":
            raise EndpointBusy(f"the sample was ended there: {str(finish.get('message'))[:200]}")
        seen = len(self.tokens)
        self.add(answer, vocab_size)
        if len(self.tokens) == seen:
            raise EndpointRefused("a sample has no tokens")
        found = self.stops.end(self.tokens, seen)
        if found is not None:
            count, self.reason = found
            del self.tokens[count:], self.logprobs[count:], self.top[count:]

    def add(self, answer: dict[str, Any], vocab_size: int) -> None:
        """Tokens and log-probs as they come. Raises EndpointRefused."""
        meta = answer.get("meta_info") or {}
        entries = meta.get("output_token_logprobs") or []
        tops = meta.get("output_top_logprobs") or [] if self.topk else []
        tokens, logprobs = _read(entries, vocab_size)
        if tokens != list(answer.get("output_ids") or []) or (self.topk and len(tops) != len(tokens)):
            raise EndpointRefused("a sample's tokens and its log-probs do not agree")
        self.tokens += tokens
        self.logprobs += logprobs
        self.top += [likely(row, self.topk) for row in tops]

    def sequence(self) -> messages.SampledSequence:
        assert self.reason is not None
        return messages.SampledSequence(
            np.asarray(self.tokens, "<i4").tobytes(),
            np.asarray(self.logprobs, "<f4").tobytes(),
            self.reason,
            table(self.top, self.topk) if self.topk else None,
        )

    def drawn(self, request_id: str, index: int, meanwhile: Drawing) -> messages.Drawn | None:
        """What there is to tell of, with what `meanwhile` has of the answer under way."""
        tokens, begin = self.tokens + meanwhile.tokens, self.told
        if len(tokens) <= begin:
            return None
        logprobs, top = self.logprobs + meanwhile.logprobs, self.top + meanwhile.top
        self.told = len(tokens)
        return messages.Drawn(
            request_id,
            index,
            begin,
            np.asarray(tokens[begin:], "<i4").tobytes(),
            np.asarray(logprobs[begin:], "<f4").tobytes(),
            table(top[begin:], self.topk) if self.topk else None,
        )


def _read(entries: Sequence[Any], vocab_size: int) -> tuple[list[int], list[float]]:
    """Of [[log-prob, token, text], ...]. Raises EndpointRefused."""
    tokens, logprobs = [], []
    for logprob, token, *_ in entries:
        if not isinstance(token, int) or not 0 <= token < vocab_size:
            raise EndpointRefused(f"a token {str(token)[:20]} is outside of 0..{vocab_size - 1}")
        if not isinstance(logprob, (int, float)) or not math.isfinite(logprob):
            raise EndpointRefused("a log-prob is not finite")
        tokens.append(token)
        logprobs.append(float(logprob))
    return tokens, logprobs


def likely(row: Sequence[Any] | None, k: int) -> list[tuple[int, float]]:
    """The first k of [[log-prob, token, text], ...]."""
    return [(int(token), float(logprob)) for logprob, token, *_ in (row or [])[:k]]


def table(rows: list[list[tuple[int, float]]], k: int) -> messages.TopK:
    tokens = np.zeros((len(rows), k), "<i4")
    logprobs = np.full((len(rows), k), messages.EMPTY_LOGPROB, "<f4")
    for at, row in enumerate(rows):
        for place, (token, logprob) in enumerate(row):
            tokens[at, place], logprobs[at, place] = token, logprob
    return messages.TopK(tokens.tobytes(), logprobs.tobytes(), k, len(rows))
