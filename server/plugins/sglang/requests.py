"""A sample as requests to SGLang's `/generate`, and its sequences from the first request until all have
ended.

`why_not` names the field of a sample that SGLang would not serve exactly as asked. SGLang's log-probs are
of the tempered distribution before all filters, as ours; those of a prompt are requested greedily, which
leaves them untempered.

SGLang ends sequences by rules of its own: at the model's end-of-sequence token even where that is no
stop, not at a stop string whose tokens differ from those of its spelling, and by length rather than by a
stop that comes with the last token. It is told to stop where it can, and the embedded sampler's rule
decides: a sequence that ended too early goes on from its tokens with the same weights, and one that went
too far is cut. Neither changes the distribution of its tokens.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ....ckpt.tokenizer_files import end_tokens, has_tokenizer
from ....engine import messages
from ...base_models import BaseModel
from ...errors import BadRequest
from ...events import Tasks
from ...text import of_folder
from ...wire.results import tokens_of
from .endpoint import CUT_TOKENS, CannotServe, EndpointBusy, EndpointError, EndpointRefused, Limits
from .endpoints import Registered


@dataclass(frozen=True)
class Stops:
    """The rule by which a sequence ends.

    `decode` returns the text of tokens, including special ones; needed with `strings`.
    """

    tokens: frozenset[int]
    strings: tuple[str, ...]
    longest: int  # tokens
    decode: Callable[[list[int]], str] | None = None

    def end(self, tokens: list[int], seen: int = 0) -> tuple[int, Literal["stop", "length"]] | None:
        """Return the length of the finished sequence and why it ends there; None if it goes on.

        A stop wins over the length. The first `seen` tokens are known not to end it.
        """
        at = next((i + 1 for i in range(seen, len(tokens)) if tokens[i] in self.tokens), None)
        by_text = self._by_text(tokens, seen)
        ends = [each for each in (at, by_text) if each is not None and each <= self.longest]
        if ends:
            return min(ends), "stop"
        return (self.longest, "length") if len(tokens) >= self.longest else None

    def _by_text(self, tokens: list[int], seen: int) -> int | None:
        """Return the number of tokens with which a stop string is complete."""
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
    """One sequence that an SGLang server draws.

    `topk`: how many likely tokens to return at each position. `sent`: how many tokens a stream has sent.
    """

    stops: Stops
    prompt: list[int]
    topk: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    reason: Literal["stop", "length"] | None = None
    sent: int = 0

    @property
    def remaining(self) -> int:
        return self.stops.longest - len(self.tokens)

    def take(self, answer: dict[str, Any], vocab_size: int) -> None:
        """Add the tokens of an answer. Raises EndpointRefused if it is invalid, EndpointBusy if it was
        aborted."""
        meta = answer.get("meta_info") or {}
        finish = meta.get("finish_reason") or {}
        if finish.get("type") == "abort":
            raise EndpointBusy(f"the server aborted the sample: {str(finish.get('message'))[:200]}")
        seen = len(self.tokens)
        self.add(answer, vocab_size)
        if len(self.tokens) == seen:
            raise EndpointRefused("a sample has no tokens")
        found = self.stops.end(self.tokens, seen)
        if found is not None:
            count, self.reason = found
            del self.tokens[count:], self.logprobs[count:], self.top[count:]

    def add(self, answer: dict[str, Any], vocab_size: int) -> None:
        """Append tokens and log-probs as they come. Raises EndpointRefused."""
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
        """Return the tokens to stream next, which include those of the unfinished request, `meanwhile`."""
        tokens, begin = self.tokens + meanwhile.tokens, self.sent
        if len(tokens) <= begin:
            return None
        logprobs, top = self.logprobs + meanwhile.logprobs, self.top + meanwhile.top
        self.sent = len(tokens)
        return messages.Drawn(
            request_id,
            index,
            begin,
            np.asarray(tokens[begin:], "<i4").tobytes(),
            np.asarray(logprobs[begin:], "<f4").tobytes(),
            table(top[begin:], self.topk) if self.topk else None,
        )


def _read(entries: Sequence[Any], vocab_size: int) -> tuple[list[int], list[float]]:
    """Read tokens and log-probs from [[log-prob, token, text], ...]. Raises EndpointRefused."""
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
    """Return the first k of [[log-prob, token, text], ...]."""
    return [(int(token), float(logprob)) for logprob, token, *_ in (row or [])[:k]]


def table(rows: list[list[tuple[int, float]]], k: int) -> messages.TopK:
    """Return rows of likely tokens as one padded table."""
    tokens = np.zeros((len(rows), k), "<i4")
    logprobs = np.full((len(rows), k), messages.EMPTY_LOGPROB, "<f4")
    for at, row in enumerate(rows):
        for place, (token, logprob) in enumerate(row):
            tokens[at, place], logprobs[at, place] = token, logprob
    return messages.TopK(tokens.tobytes(), logprobs.tobytes(), k, len(rows))


_GREEDY_BELOW = 1e-6  # SGLang draws greedily below this temperature, with untempered log-probs


def why_not(sample: messages.Sample, model: BaseModel, limits: Limits | None, seeds: bool) -> str | None:
    """Return why an SGLang server cannot draw the sample exactly, naming the field; None if it can.

    `limits` None: the server is not known yet. `seeds`: whether it may draw with a seed, from which it makes
    other numbers than the engine.
    """
    params = sample.params
    greedy = params.temperature == 0.0
    if params.seed is not None and not (seeds and limits is not None and limits.deterministic):
        return "seed: an SGLang server draws with seeds only where it runs deterministic inference"
    if not greedy and params.temperature < _GREEDY_BELOW:
        return f"temperature: SGLang treats {params.temperature} as 0"
    if params.temperature not in (0.0, 1.0) and limits is not None and not limits.tempered:
        return "temperature: this SGLang server reports log-probs of the untempered distribution"
    if (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1.0, 0.0, 0.0):
        return "repetition_penalty, presence_penalty, frequency_penalty: SGLang computes them differently"
    if not greedy and params.top_k == 1 and params.temperature != 1.0:
        return "top_k: 1 makes SGLang greedy, with other log-probs; send temperature 0"
    if not greedy and params.top_k > 0 and params.top_p < 1.0:
        return "top_k, top_p: together SGLang keeps other tokens: its top_p is a share of all tokens"
    if params.seed is not None and params.min_p > 0.0:
        return "seed, min_p: together they would crash an SGLang server"
    if sample.prompt_targets is not None:
        return "target_prompt_logprobs: SGLang scores the same tokens at all positions"
    if sample.prompt_alternatives:
        return "prompt_alt_tokens_k: SGLang draws nothing at a prompt's positions"
    if sample.record_routing:
        return "record_routing: the experts that SGLang chooses are not read from it"
    last_n, length = sample.prompt_logprobs_last_n, len(sample.prompt) // 4
    if last_n is not None and not (sample.prompt_logprobs and 1 <= last_n < length):
        return (
            f"prompt_logprobs_last_n: {last_n}; it must be between 1 and the prompt's {length} tokens less "
            "one, with prompt_logprobs"
        )
    if len(sample.prompt) // 4 >= model.max_sequence_length:
        return "prompt: it fills the model's context, and SGLang draws nothing after it"
    if limits is not None and (problem := _too_long(sample, model, limits)) is not None:
        return problem
    if any(params.stop_strings) and not has_tokenizer(model.folder):
        return "stop: this model has no tokenizer on the server; give stop token ids instead"
    return None


def _too_long(sample: messages.Sample, model: BaseModel, limits: Limits) -> str | None:
    """Return why a sequence is too long. One up to the context's end may end `CUT_TOKENS` earlier."""
    longest, own = limits.longest, model.max_sequence_length
    prompt = len(sample.prompt) // 4
    wanted = prompt + _longest(sample, model)
    if limits.max_input is not None and prompt >= limits.max_input:
        return f"prompt: {prompt} tokens; the SGLang server takes fewer than {limits.max_input}"
    if longest is None or wanted <= longest or (wanted == own <= longest + CUT_TOKENS and prompt < longest):
        return None
    return f"max_tokens: {wanted} tokens with the prompt; the SGLang server takes {longest}"


def _longest(sample: messages.Sample, model: BaseModel) -> int:
    """Return how many tokens a sequence may have, as in the embedded sampler."""
    room = model.max_sequence_length - len(sample.prompt) // 4
    return room if sample.params.max_tokens is None else min(sample.params.max_tokens, room)


def new_drawings(sample: messages.Sample, model: BaseModel, limits: Limits) -> list[Drawing]:
    """Return an empty drawing for each sequence of the sample."""
    params, prompt = sample.params, tokens_of(sample.prompt)
    longest = _longest(sample, model)
    if limits.longest is not None:
        longest = min(longest, limits.longest - len(prompt))
    strings = tuple(string for string in params.stop_strings if string)
    stop_tokens = params.stop_tokens
    if stop_tokens is None:
        stop_tokens = [] if params.stop_strings else [*end_tokens(model.folder)]
    known = frozenset(token for token in stop_tokens if 0 <= token < model.vocab_size)
    decode = of_folder(model.folder).matched_text if strings else None
    stops = Stops(known, strings, longest, decode)
    return [Drawing(stops, prompt, sample.topk_sample_logprobs) for _ in range(sample.num_samples)]


def scores_prompt(sample: messages.Sample) -> bool:
    return sample.prompt_logprobs or sample.topk_prompt_logprobs > 0


def prompt_body(sample: messages.Sample, rid: str, lora: str | None) -> dict[str, Any]:
    """Return the request that scores the prompt and draws nothing."""
    params = {"max_new_tokens": 0, "temperature": 0.0}
    return _body(tokens_of(sample.prompt), params, rid, lora) | {
        "logprob_start_len": 0,
        "top_logprobs_num": sample.topk_prompt_logprobs,
    }


def body(sample: messages.Sample, drawing: Drawing, rid: str, lora: str | None, seed: int | None) -> dict:
    """Return the request for the tokens that the drawing does not have yet."""
    params, stops = sample.params, drawing.stops
    fields: dict[str, Any] = {
        "max_new_tokens": drawing.remaining,
        "temperature": params.temperature,
        "top_k": min(params.top_k, (1 << 31) - 1),  # SGLang's limit of 32 bits
        "top_p": params.top_p,
        "min_p": params.min_p,
        "stop": list(stops.strings),
        "stop_token_ids": sorted(stops.tokens),
        # If it is off, the model's own end token stops too; if it is on, no token does.
        "ignore_eos": not stops.tokens,
        "skip_special_tokens": False,
    }
    if seed is not None:
        fields["sampling_seed"] = seed
    return _body(drawing.prompt + drawing.tokens, fields, rid, lora) | {
        "logprob_start_len": -1,
        "top_logprobs_num": drawing.topk,
    }


def _body(tokens: list[int], params: dict[str, Any], rid: str, lora: str | None) -> dict[str, Any]:
    named = {} if lora is None else {"lora_path": lora}
    return {"input_ids": tokens, "sampling_params": params, "rid": rid, "return_logprob": True} | named


def together(bodies: list[dict[str, Any]]) -> dict[str, Any]:
    """Combine several requests into one."""
    shared = {"return_logprob": True}
    return {key: [body[key] for body in bodies] for key in bodies[0] if key not in shared} | shared


def prompt_scores(sample: messages.Sample, answer: dict[str, Any]) -> dict[str, Any]:
    """Return the prompt's scores as fields of `messages.SampleOutput`. Raises EndpointRefused."""
    prompt = tokens_of(sample.prompt)
    meta = answer.get("meta_info") or {}
    entries, tops = meta.get("input_token_logprobs") or [], meta.get("input_top_logprobs") or []
    if [entry[1] for entry in entries] != prompt or (
        sample.topk_prompt_logprobs and len(tops) != len(prompt)
    ):
        raise EndpointRefused("a prompt's tokens and its log-probs do not agree")
    first = 1 if sample.prompt_logprobs_last_n is None else len(prompt) - sample.prompt_logprobs_last_n
    logprobs = np.full(len(prompt), np.nan, "<f4")
    logprobs[first:] = [entry[0] for entry in entries[first:]]
    if not np.isfinite(logprobs[first:]).all():
        raise EndpointRefused("a log-prob of the prompt is not finite")
    found: dict[str, Any] = {}
    if sample.prompt_logprobs:
        found["prompt_logprobs"] = logprobs.tobytes()
    if k := sample.topk_prompt_logprobs:
        rows = [likely(row, k) if at >= first else [] for at, row in enumerate(tops)]
        found["topk_prompt_logprobs"] = table(rows, k)
    return found


def output(
    drawings: list[Drawing], answers: list[dict[str, Any]], scores: dict[str, Any]
) -> messages.SampleOutput:
    """Return the sample's output. `answers`: the first answer of each sequence."""
    cached = [int((answer.get("meta_info") or {}).get("cached_tokens") or 0) for answer in answers]
    return messages.SampleOutput(
        [drawing.sequence() for drawing in drawings], prompt_cache_hit_tokens=max(cached, default=0), **scores
    )


# --- one sample on one server

Answer = dict[str, Any]
_attempts = itertools.count()  # a server refuses a request id that it already has
_aborting = Tasks()


@dataclass(eq=False)
class RemoteSample:
    """One sample on a server. `has_streamed`: a stream has sent tokens, which cannot be replaced any more."""

    request_id: str
    sample: messages.Sample
    model: BaseModel
    on_drawn: Callable[[messages.Drawn], None]
    has_streamed: bool = False

    async def draw(
        self, endpoint: Registered, lora: str | None, weight_version: str
    ) -> messages.SampleOutput:
        """Draw all of the sample on one server, with the adapter and weights of these names.

        Raises EndpointError, also if the server's weights change meanwhile.
        """
        rid = f"{self.request_id}.{next(_attempts)}"
        under_way: set[str] = set()
        try:
            return await self._draw(endpoint, lora, weight_version, rid, under_way)
        except asyncio.CancelledError:
            if under_way:
                _aborting.begin(_abort(endpoint, sorted(under_way)))
            raise

    async def _draw(
        self, endpoint: Registered, lora: str | None, weight_version: str, rid: str, under_way: set[str]
    ) -> messages.SampleOutput:
        assert endpoint.limits is not None
        sample, scores = self.sample, {}
        try:  # in a thread, because stop strings may need the tokenizer
            drawings = await asyncio.to_thread(new_drawings, sample, self.model, endpoint.limits)
        except BadRequest as error:
            raise CannotServe(f"stop: {error.message}") from None
        bodies: dict[Any, dict[str, Any]] = {}
        if scores_prompt(sample):
            bodies[None] = prompt_body(sample, f"{rid}.prompt", lora)
        first: list[Answer] = []
        while unfinished := {i: each for i, each in enumerate(drawings) if each.reason is None}:
            for index, drawing in unfinished.items():
                seed = None if sample.params.seed is None else _seed(sample.params.seed, index)
                name = f"{rid}.{index}.{len(drawing.tokens)}"
                bodies[index] = body(sample, drawing, name, lora, seed)
            under_way.update(body["rid"] for body in bodies.values())
            answers = await self._answers(endpoint, weight_version, bodies, drawings)
            under_way.clear()
            for answer in answers.values():
                _require_weights(answer, weight_version)
            if None in answers:
                scores = prompt_scores(sample, answers.pop(None))
            first = first or list(answers.values())
            for index, answer in answers.items():
                drawings[index].take(answer, self.model.vocab_size)
            bodies = {}
        return output(drawings, first, scores)

    async def _answers(
        self,
        endpoint: Registered,
        weight_version: str,
        bodies: dict[Any, dict[str, Any]],
        drawings: list[Drawing],
    ) -> dict[Any, Answer]:
        """Send the bodies to the server; return each one's answer under the body's key."""
        if self.sample.stream:
            asked = (
                self._streamed(
                    endpoint, weight_version, body, index, None if index is None else drawings[index]
                )
                for index, body in bodies.items()
            )
            return dict(zip(bodies, await asyncio.gather(*asked), strict=True))
        answers = await endpoint.client.generate(together(list(bodies.values())))
        if len(answers) != len(bodies):
            raise EndpointRefused(f"{len(bodies)} requests have {len(answers)} answers")
        return dict(zip(bodies, answers, strict=True))

    async def _streamed(
        self,
        endpoint: Registered,
        weight_version: str,
        body: dict[str, Any],
        index: Any,
        drawing: Drawing | None,
    ) -> Answer:
        """Pass on the parts of a stream; return the last part, which has everything."""
        last: Answer | None = None
        async for part in endpoint.client.stream(body):
            _require_weights(part, weight_version)
            last = part
            if drawing is None:
                continue
            meanwhile = Drawing(drawing.stops, [], drawing.topk)
            meanwhile.add(part, self.model.vocab_size)
            drawn = drawing.drawn(self.request_id, index, meanwhile)
            if drawn is not None:
                self.has_streamed = True
                self.on_drawn(drawn)
        if last is None:
            raise EndpointRefused("a stream has no parts")
        return last


def _seed(seed: int, index: int) -> int:
    """Derive a 31-bit seed, as SGLang takes them, for one sequence of a sample."""
    return int.from_bytes(hashlib.sha256(f"{seed}.{index}".encode()).digest()[:4]) >> 1


def _require_weights(answer: Answer, weight_version: str) -> None:
    """Raise EndpointBusy if any part was drawn with other weights."""
    meta = answer.get("meta_info") or {}
    versions = {each.get("version") for each in meta.get("weight_versions") or []}
    versions.add(meta.get("weight_version", weight_version))
    if versions != {weight_version}:
        drawn = str(sorted(map(str, versions)))[:256]
        raise EndpointBusy(f"it drew with weights {drawn}, not {weight_version!r}")


async def _abort(endpoint: Registered, rids: list[str]) -> None:
    """Abort the requests of a client that is gone."""
    for rid in rids:
        with contextlib.suppress(EndpointError):
            await endpoint.client.abort_request(rid)
