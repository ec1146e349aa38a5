"""SGLang's `/generate`: the route, and its answers, whole or as a stream of events.

Log-probs of chosen tokens (`token_ids_logprob`) need a second request to the engine, because it scores chosen
tokens at the positions of a prompt: the sample that was drawn is sent again as the end of its prompt.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import orjson
from fastapi import APIRouter, Request
from fastapi.responses import Response

from ....engine import messages
from ...errors import ApiError, BadRequest, internal_error
from ...text import ChatTokenizer, SampledText
from ...wire import sample_requests as wire
from ...wire.results import likely_of, logprobs_of, prompt_logprobs_of, tokens_of
from ..bodies import BodyRoute
from ..dependencies import Owner, Provided, described_as
from ..sample_targets import ServedModel
from ..samples import (
    NamedModel,
    RequestSamples,
    Running,
    SampleRequest,
    ServedSamples,
    event,
    outputs_of,
    while_connected,
)

router = APIRouter(tags=["inference"], route_class=BodyRoute)

_MOST_SCORES = 1 << 20  # of one prompt, for token_ids_logprob
Row = list[tuple[int, float]]
"""Tokens at one position, and their log-probs."""
Entry = list[Any]
"""A token as a list: its log-prob, its id, and its text or null."""


@router.post("/generate", response_model=None, responses=described_as(wire.Generated, events=wire.Generation))
async def generate(
    body: wire.Generate, request: Request, served: Provided[ServedSamples], owner: Owner
) -> Response:
    """Draw samples as SGLang does: the answer is one object, or a list for several prompts or samples. With
    `stream` it is server-sent events, each with all there is so far. Closing the connection cancels the
    samples."""
    return await while_connected(request, _generate(body, served, owner))


async def _generate(body: wire.Generate, served: ServedSamples, owner: str) -> Response:
    began = time.monotonic()
    models: dict[str | None, NamedModel] = {}
    prompts, requests = [], []
    for fields in body.each:
        if fields.model not in models:
            models[fields.model] = await served.named(owner, fields.model)
        model = models[fields.model]
        prompts.append(Prompt(fields, model.served, model.base.vocab_size, model.tokenizer))
        requests.append(prompts[-1].request(await model.tokens(fields.prompt), body.stream))
    async with served.of_request(owner) as samples:
        answers = Answers(served, body, prompts, await served.submit(samples, requests), began)
        if body.stream:
            samples.disown()
            return served.streamed(answers.events(owner))
        return Response(await answers.whole(samples), media_type="application/json")


@dataclass(frozen=True)
class Prompt:
    """One prompt of a body, with the model and the tokenizer that it names."""

    fields: wire.OnePrompt
    model: ServedModel
    vocab_size: int
    text: ChatTokenizer

    @property
    def scores_prompt(self) -> bool:
        return self.fields.return_logprob and self.fields.logprob_start_len >= 0

    @property
    def scores_tokens(self) -> bool:
        return self.fields.return_logprob and bool(self.fields.token_ids_logprob)

    def first_scored(self, prompt: list[int]) -> int:
        """Return the position from which on the prompt's tokens are scored; its end if they are not."""
        return self.fields.logprob_start_len if self.scores_prompt else len(prompt)

    def request(self, prompt: list[int], stream: bool) -> SampleRequest:
        """Return the request for this prompt, whose tokens are `prompt`. Raises BadRequest."""
        fields, params = self.fields, self.fields.params
        if fields.return_logprob and fields.logprob_start_len > len(prompt):
            raise BadRequest(
                f"logprob_start_len: {fields.logprob_start_len} is over the prompt's {len(prompt)} tokens"
            )
        scored = fields.token_ids_logprob
        unknown = next((token for token in scored if token >= self.vocab_size), None)
        if unknown is not None:
            raise BadRequest(f"token_ids_logprob: {unknown} is outside the vocabulary [0, {self.vocab_size})")
        positions = len(prompt) - self.first_scored(prompt) + (params.max_new_tokens or 1)
        if self.scores_tokens and positions * len(scored) * params.n > _MOST_SCORES:
            raise BadRequest(
                f"token_ids_logprob: {len(scored)} tokens at up to {positions} positions of {params.n} "
                f"samples are over the limit of {_MOST_SCORES} log-probs"
            )
        topk = fields.top_logprobs_num if fields.return_logprob else 0
        return SampleRequest(
            self.model,
            prompt,
            params.message(self.text.end_tokens),
            num_samples=params.n,
            topk=topk,
            prompt_logprobs=self.scores_prompt,
            prompt_topk=topk if self.scores_prompt else 0,
            stream=stream,
            keep_stop=params.no_stop_trim,
            skip_special_tokens=params.skip_special_tokens,
            prompt_field="text" if isinstance(fields.prompt, str) else "input_ids",
        )


@dataclass
class _Sequence:
    """The tokens of one sample, in the course of a stream or at its end, and what was scored for them."""

    text: SampledText
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    likely: list[Row] = field(default_factory=list)
    scores: tuple[list[Row], list[Row]] | None = None

    def add(self, part: messages.Drawn | messages.SampledSequence, begin: int = 0) -> bool:
        """Take in tokens from the `begin`-th on, and return whether some of them are new."""
        tokens = tokens_of(part.tokens)
        if begin + len(tokens) <= len(self.tokens):  # of an engine that began it again
            return False
        self.tokens[begin:], self.logprobs[begin:] = tokens, logprobs_of(part.logprobs)
        self.likely[begin:] = likely_of(part.topk)
        return True


@dataclass(frozen=True)
class Answers:
    """Writes the answers of one request. `prompts` and `running` belong together; `began`: the time of the
    request by the monotonic clock."""

    served: ServedSamples
    body: wire.Generate
    prompts: Sequence[Prompt]
    running: Sequence[Running]
    began: float

    @property
    def _num_samples(self) -> int:
        return self.prompts[0].fields.params.n

    @property
    def _several(self) -> bool:
        return self.body.is_batch or self._num_samples > 1

    async def whole(self, samples: RequestSamples) -> bytes:
        """Return all answers as JSON. Raises ApiError."""
        found = []
        for place, output in enumerate(await outputs_of(self.running)):
            found += await self._answers(samples, place, output)
        return b"[" + b",".join(found) + b"]" if self._several else found[0]

    async def events(self, owner: str) -> AsyncGenerator[bytes]:
        """Yield events, each with all there is so far of one sample.

        A sample whose prompt or chosen tokens are scored comes in one event, because those scores come last.
        """
        growing = [
            self._sequence(place) for place in range(len(self.running)) for _ in range(self._num_samples)
        ]
        try:
            async with self.served.of_request(owner) as samples:
                async for place, part in self.served.drawn(self.running):
                    if isinstance(part, messages.SampleOutput):
                        for answer in await self._answers(samples, place, part, in_stream=True):
                            yield b"data: " + answer + b"\n\n"
                        continue
                    prompt, index = self.prompts[place], place * self._num_samples + part.index
                    sequence = growing[index]
                    if prompt.scores_prompt or prompt.scores_tokens or not sequence.add(part, part.begin):
                        continue
                    sequence.text.add(part.begin, tokens_of(part.tokens))
                    text, meta = sequence.text.sent, self._meta(place, part.index, sequence, None)
                    yield event(self._answer(place, index, sequence, text, meta, in_stream=True))
        except ApiError as error:
            yield _error_event(error.status, error.message)
        except Exception as error:
            yield _error_event(500, internal_error("a stream of samples", error))
        yield b"data: [DONE]\n\n"

    async def _answers(
        self, samples: RequestSamples, place: int, output: messages.SampleOutput, in_stream: bool = False
    ) -> list[bytes]:
        """Return the JSON of each sample of a prompt."""
        write = partial(self.served.written, samples.owner, [output])
        prompt, request = self.prompts[place], self.running[place].request
        sequences: list[_Sequence] = await write(lambda: self._sequences(place, output))
        if prompt.scores_tokens:
            begin = min(prompt.first_scored(request.prompt), len(request.prompt) - 1)
            tokens = prompt.fields.token_ids_logprob
            scored = [ChosenTokens(request, each.tokens, tokens, begin) for each in sequences]
            for each, scores in zip(sequences, await score(self.served, samples, scored), strict=True):
                each.scores = scores
        return await write(lambda: self._written(place, output, sequences, in_stream))

    def _sequences(self, place: int, output: messages.SampleOutput) -> list[_Sequence]:
        sequences = []
        for drawn in output.sequences:
            sequence = self._sequence(place)
            sequence.add(drawn)
            if self.running[place].request.draws_nothing:  # what would have come next
                sequence.likely = likely_of(drawn.topk)
            sequences.append(sequence)
        return sequences

    def _sequence(self, place: int) -> _Sequence:
        return _Sequence(self.running[place].request.text(self.prompts[place].text))

    def _written(
        self, place: int, output: messages.SampleOutput, sequences: list[_Sequence], in_stream: bool
    ) -> list[bytes]:
        found = []
        for number, (sequence, drawn) in enumerate(zip(sequences, output.sequences, strict=True)):
            if drawn.stop_reason == "length":
                reason: dict[str, Any] = {"type": "length", "length": len(sequence.tokens)}
            else:
                matched = sequence.text.matched(sequence.tokens, drawn.stop_reason)
                reason = {"type": "stop", "matched": matched}
            meta = self._meta(place, number, sequence, reason) | {
                "cached_tokens": output.prompt_cache_hit_tokens,
                "e2e_latency": time.monotonic() - self.began,
            }
            if self.prompts[place].fields.return_logprob:
                meta |= self._prompt_scores(place, output, sequence)
            text = sequence.text.whole(sequence.tokens, drawn.stop_reason)
            index = place * self._num_samples + number
            found.append(orjson.dumps(self._answer(place, index, sequence, text, meta, in_stream)))
        return found

    def _answer(
        self, place: int, index: int, sequence: _Sequence, text: str, meta: dict[str, Any], in_stream: bool
    ) -> dict[str, Any]:
        answer: dict[str, Any] = {"text": text, "output_ids": sequence.tokens, "meta_info": meta}
        if self.body.return_prompt_token_ids:
            answer["prompt_token_ids"] = self.running[place].request.prompt
        if in_stream and self._several:
            answer["index"] = index
        return answer

    def _meta(
        self, place: int, number: int, sequence: _Sequence, reason: dict[str, Any] | None
    ) -> dict[str, Any]:
        request, count = self.running[place].request, len(sequence.tokens)
        identifier = self.prompts[place].fields.rid or self.running[place].operation.request_id
        meta: dict[str, Any] = {
            "id": f"{identifier}_{number}" if self._num_samples > 1 else identifier,
            "finish_reason": reason,
            "prompt_tokens": len(request.prompt),
            "completion_tokens": count,
            "reasoning_tokens": 0,
            "num_retractions": 0,
            "weight_version": request.model.version,
            "weight_versions": [{"version": request.model.version, "start": 0, "end": count}],
        }
        if not self.prompts[place].fields.return_logprob:
            return meta
        entries = [self._entry(place, *each) for each in zip(sequence.tokens, sequence.logprobs, strict=True)]
        meta |= {
            "input_token_logprobs": [],
            "output_token_logprobs": entries,
            "output_token_logprobs_length": count,
        }
        if request.topk:
            rows = [self._row(place, row) for row in sequence.likely]
            meta |= {"input_top_logprobs": [], "output_top_logprobs": rows}
        return meta

    def _prompt_scores(
        self, place: int, output: messages.SampleOutput, sequence: _Sequence
    ) -> dict[str, Any]:
        """Return the log-probs of the prompt from `logprob_start_len` on. As in SGLang the first has none."""
        prompt, request = self.prompts[place], self.running[place].request
        found: dict[str, Any] = {}
        begin = prompt.first_scored(request.prompt)
        tokens = request.prompt[begin:]
        if prompt.scores_prompt:
            values = [None, *prompt_logprobs_of(output)[begin + 1 :]][: len(tokens)]
            entries = [self._entry(place, *each) for each in zip(tokens, values, strict=True)]
            found["input_token_logprobs"] = entries
            if request.prompt_topk:
                rows = likely_of(output.topk_prompt_logprobs)[begin + 1 :]
                found["input_top_logprobs"] = [None, *(self._row(place, row) for row in rows)][: len(tokens)]
        if sequence.scores is not None:
            of_prompt, of_drawn = sequence.scores
            before = [None, *(self._row(place, row) for row in of_prompt)] if tokens else []
            found["input_token_ids_logprobs"] = before
            found["output_token_ids_logprobs"] = [self._row(place, row) for row in of_drawn]
        return found

    def _row(self, place: int, row: Row) -> list[Entry]:
        return [self._entry(place, *pair) for pair in row]

    def _entry(self, place: int, token: int, logprob: float | None) -> Entry:
        with_text = self.body.return_text_in_logprobs
        return [logprob, token, self.prompts[place].text.decode([token], False) if with_text else None]


def _error_event(status: int, message: str) -> bytes:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return event({"error": {"message": message, "type": kind, "code": status}})


@dataclass(frozen=True)
class ChosenTokens:
    """Tokens to score at the positions of `request.prompt` after the `begin`-th, and at those of `drawn`.

    If nothing was drawn, they are scored at the position after the prompt. `begin` is a position of the
    prompt.
    """

    request: SampleRequest
    drawn: list[int]
    tokens: list[int]
    begin: int

    @property
    def sequence(self) -> list[int]:
        return self.request.prompt + (self.drawn or [0])  # the last token only makes a position

    def cells(self) -> messages.PromptCells:
        """Return the tokens to score by position: row i is about position i + 1; rows before `begin` are
        empty."""
        rows, columns = len(self.sequence) - 1, len(self.tokens)
        full = rows - self.begin
        ends = [np.zeros(self.begin + 1, "<i8"), columns * np.arange(1, full + 1, dtype="<i8")]
        return messages.PromptCells(
            (rows, columns),
            np.tile(np.asarray(self.tokens, "<i4"), full).tobytes(),
            np.concatenate(ends).tobytes(),
            np.tile(np.arange(columns, dtype="<i8"), full).tobytes(),
        )

    def rows(self, output: messages.SampleOutput) -> tuple[list[Row], list[Row]]:
        """Return the scores in an answer: a row for each position of the prompt, and of what was drawn."""
        assert output.prompt_targets is not None
        values = np.frombuffer(output.prompt_targets.values, "<f4").reshape(-1, len(self.tokens))
        rows = [[*zip(self.tokens, row, strict=True)] for row in values.tolist()]
        of_prompt = len(self.request.prompt) - 1 - self.begin
        return rows[:of_prompt], rows[of_prompt:]


async def score(
    served: ServedSamples, samples: RequestSamples, chosen: Sequence[ChosenTokens]
) -> list[tuple[list[Row], list[Row]]]:
    """Score chosen tokens: return rows for the positions of the prompt and of what was drawn. Raises
    ApiError."""
    requests = [
        replace(
            each.request,
            prompt=each.sequence,
            params=messages.SamplingParams(max_tokens=0, temperature=0.0),
            num_samples=1,
            topk=0,
            prompt_logprobs=False,
            prompt_topk=0,
            targets=each.cells(),
            stream=False,
        )
        for each in chosen
    ]
    outputs = await outputs_of(await served.submit(samples, requests))
    return [each.rows(output) for each, output in zip(chosen, outputs, strict=True)]
