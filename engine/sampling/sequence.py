"""A sample request in progress: its prompt's state, its sequences, its answer."""

from __future__ import annotations

import secrets
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ...model.decode import Decoded
from .. import messages
from .prompt_scores import PromptScores, TopTable
from .sampler_weights import Weights
from .stop import StopReason, StopRule


@dataclass(eq=False)
class Generation:
    """One request. `arrival` orders requests: the newest gives way when memory is short."""

    request: messages.Sample
    weights: Weights
    arrival: int
    prompt: np.ndarray  # int32[prompt_len]
    seed: int  # 64 bits
    scores: PromptScores
    cache_hit_tokens: int = 0
    started: float = field(default_factory=time.monotonic)
    device_seconds: float = 0.0
    finished: dict[int, messages.SampledSequence] = field(default_factory=dict)

    @property
    def is_finished(self) -> bool:
        return len(self.finished) == self.request.num_samples

    def answer(self) -> messages.Done:
        return messages.Done(
            request_id=self.request.request_id,
            output=messages.SampleOutput(
                sequences=[self.finished[i] for i in range(self.request.num_samples)],
                prompt_cache_hit_tokens=self.cache_hit_tokens,
                **self.scores.fields(),
            ),
            device_seconds=self.device_seconds,
        )


@dataclass(eq=False)
class Sequence:
    """One sample. All of its tokens but the last are in the cache whenever it runs."""

    generation: Generation
    index: int  # among the request's samples
    stop: StopRule
    tokens: list[int]  # prompt and sample
    logprobs: list[float] = field(default_factory=list)
    top: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    slot: int = 0  # of its state, if the model keeps any
    state_goes_on: bool = False  # the device has run tokens that the sample does not have
    last_turn: int = 0  # number of the decode chunk that it was last in, or before which it came
    reported: int = 0  # of its sample's tokens, by `drawn`
    experts: messages.RoutedExperts | None = None  # of its tokens, if they are recorded

    @property
    def num_cached(self) -> int:
        return len(self.tokens) - 1

    @property
    def is_new(self) -> bool:
        """True if it has drawn nothing yet."""
        return not self.logprobs

    def take(self, row: int, decoded: Decoded) -> StopReason | Literal["not finite"] | None:
        """Append the tokens of a decode chunk's row, up to the sequence's end; return why it ended, or
        None."""
        wants_top = self.generation.request.topk_sample_logprobs > 0
        for step in range(int(decoded.steps)):
            token, logprob = int(decoded.tokens[step, row]), float(decoded.logprobs[step, row])
            if not np.isfinite(logprob):
                return "not finite"
            self.tokens.append(token)
            self.logprobs.append(logprob)
            if wants_top:
                self.top.append((decoded.top_tokens[step, row], decoded.top_logprobs[step, row]))
            if (reason := self.stop.after(token)) is not None:
                ends_on_device = token in self.stop.looked_at or self.stop.remaining <= 0
                self.state_goes_on = not ends_on_device and step + 1 < int(decoded.steps)
                return reason
        return None

    def drawn(self) -> messages.Drawn:
        """Return what was drawn since the last call."""
        begin, first = self.reported, len(self.generation.prompt) + self.reported
        tokens = np.asarray(self.tokens[first:], "<i4")
        logprobs = np.asarray(self.logprobs[begin:], "<f4")
        self.reported += len(tokens)
        return messages.Drawn(
            self.generation.request.request_id,
            self.index,
            begin,
            tokens.tobytes(),
            logprobs.tobytes(),
            self._likely(begin),
        )

    def _likely(self, begin: int) -> messages.TopK | None:
        """Return the most likely tokens from `begin` on, if the request wants them."""
        k = self.generation.request.topk_sample_logprobs
        if k == 0:
            return None
        rows = self.top[begin:]
        table = TopTable(k, len(rows))
        for row, (tokens, logprobs) in enumerate(rows):
            table.set(row, tokens[None], logprobs[None])
        return table.message()

    def end(self, reason: StopReason) -> None:
        """Add the finished sample to the request."""
        self.generation.finished[self.index] = messages.SampledSequence(
            tokens=np.asarray(self.tokens[len(self.generation.prompt) :], np.int32).tobytes(),
            logprobs=np.asarray(self.logprobs, np.float32).tobytes(),
            stop_reason=reason,
            topk=self._likely(0),
            experts=self.experts,
        )


@dataclass(eq=False)
class Prompt:
    """Tokens to be cached for waiting sequences.

    They are a request's prompt, or, for a sequence that lost its pages to an older request, its prompt and
    what it has generated.
    """

    generation: Generation
    sequences: deque[Sequence]
    tokens: np.ndarray  # the last one is not cached: the first decode step runs it
    digests: list[bytes] = field(default_factory=list)  # of its full pages (`PagePool.digests`)
    pages: list[int] = field(default_factory=list)
    num_cached: int = 0
    slot: int = 0  # of the state after the cached tokens, if the model keeps any

    @classmethod
    def of_sequence(cls, sequence: Sequence) -> Prompt:
        """Make the prompt of a sequence that lost its pages."""
        return cls(sequence.generation, deque([sequence]), np.array(sequence.tokens, np.int32))

    @property
    def target(self) -> int:
        return len(self.tokens) - 1

    @property
    def missing(self) -> int:
        """The tokens that are not cached yet."""
        return self.target - self.num_cached

    @property
    def reusable(self) -> int:
        """The number of first tokens that may come from the cache: all, or those up to two before the first
        scored one."""
        return self.generation.scores.first_position - 1 if self.is_scored else self.target

    @property
    def is_scored(self) -> bool:
        """Return whether these tokens are scored, so that they must run through the trunk, cached or not."""
        return self.generation.scores.is_asked and self.tokens is self.generation.prompt

    @property
    def is_cached(self) -> bool:
        return self.missing == 0


def seed_of(seed: int | None) -> int:
    """Return a client's seed (any integer, taken modulo 2^64), or fresh entropy."""
    return secrets.randbits(64) if seed is None else seed % 2**64
