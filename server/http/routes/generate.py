"""SGLang's `/generate`: the route, and its answers, whole or as a stream of events.

Log-probs of chosen tokens (`token_ids_logprob`) are computed after a sample has been drawn: the engine scores
chosen tokens at the positions of a prompt, so the sample is sent once more, as a prompt with its tokens at
the end.
"""

from __future__ import annotations

import asyncio
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
from ...base_models import BaseModels
from ...errors import ApiError, BadRequest, internal_error
from ...offload import Offload
from ...text import tokenizer
from ...text.sampled_text import SampledText
from ...text.tokenizer import ChatTokenizer
from ...wire import sampling as wire
from ...wire.results import likely_of, logprobs_of, prompt_logprobs_of, tokens_of
from ...wire.sampling import Generate, OnePrompt
from ..bodies import BodyRoute
from ..dependencies import Owner, described_as
from ..provided import Provided
from ..sample_targets import ServedModel, ServedModels
from ..samples import Asked, Prompts, RequestSamples, Running, ServedSamples, outputs_of, while_connected

Row = list[tuple[int, float]]
"""The wanted tokens at one position, and their log-probs."""


@dataclass(frozen=True)
class Wanted:
    """Which tokens to score: at the positions of `asked.prompt` after the `begin`-th, which is one of them,
    and at those of `drawn`. Of an empty `drawn` it is the position after the prompt."""

    asked: Asked
    drawn: list[int]
    tokens: list[int]
    begin: int

    @property
    def sequence(self) -> list[int]:
        return self.asked.prompt + (self.drawn or [0])  # the last token only makes a position


async def score(
    served: ServedSamples, samples: RequestSamples, wanted: Sequence[Wanted]
) -> list[tuple[list[Row], list[Row]]]:
    """Return a row for each position of the prompt and of what was drawn. Raises ApiError."""
    asked = [
        replace(
            each.asked,
            prompt=each.sequence,
            params=messages.SamplingParams(max_tokens=0, temperature=0.0),
            num_samples=1,
            topk=0,
            prompt_logprobs=False,
            prompt_topk=0,
            targets=_targets(each),
            stream=False,
        )
        for each in wanted
    ]
    outputs = await outputs_of(await served.submit(samples, asked))
    return [_rows(each, output) for each, output in zip(wanted, outputs, strict=True)]


def _targets(wanted: Wanted) -> messages.PromptCells:
    """Row i is about position i + 1; those before `begin` are empty."""
    rows, columns = len(wanted.sequence) - 1, len(wanted.tokens)
    full = rows - wanted.begin
    ends = np.concatenate([np.zeros(wanted.begin + 1, "<i8"), columns * np.arange(1, full + 1, dtype="<i8")])
    return messages.PromptCells(
        (rows, columns),
        np.tile(np.asarray(wanted.tokens, "<i4"), full).tobytes(),
        ends.tobytes(),
        np.tile(np.arange(columns, dtype="<i8"), full).tobytes(),
    )


def _rows(wanted: Wanted, output: messages.SampleOutput) -> tuple[list[Row], list[Row]]:
    assert output.prompt_targets is not None
    values = np.frombuffer(output.prompt_targets.values, "<f4").reshape(-1, len(wanted.tokens))
    rows = [[*zip(wanted.tokens, row, strict=True)] for row in values.tolist()]
    of_prompt = len(wanted.asked.prompt) - 1 - wanted.begin
    return rows[:of_prompt], rows[of_prompt:]


_MOST_SCORES = 1 << 20  # of one prompt, for token_ids_logprob
Entry = list[Any]
"""[log-prob, token, its text or null]"""


@dataclass(frozen=True)
class Prompt:
    """One prompt of a body, with the model and the tokenizer that it names."""

    said: OnePrompt
    model: ServedModel
    vocab_size: int
    text: ChatTokenizer

    @property
    def scores_prompt(self) -> bool:
        return self.said.return_logprob and self.said.logprob_start_len >= 0

    @property
    def scores_tokens(self) -> bool:
        return self.said.return_logprob and bool(self.said.token_ids_logprob)

    def first_scored(self, prompt: list[int]) -> int:
        """The position of the prompt from which on its tokens are scored; its end if they are not."""
        return self.said.logprob_start_len if self.scores_prompt else len(prompt)

    def asked(self, prompt: list[int], stream: bool) -> Asked:
        """`prompt`: its tokens. Raises BadRequest."""
        said = self.said
        if said.return_logprob and said.logprob_start_len > len(prompt):
            raise BadRequest(
                f"logprob_start_len: {said.logprob_start_len} is over the prompt's {len(prompt)} tokens"
            )
        unknown = next((token for token in said.token_ids_logprob if token >= self.vocab_size), None)
        if unknown is not None:
            raise BadRequest(f"token_ids_logprob: {unknown} is outside the vocabulary [0, {self.vocab_size})")
        positions = len(prompt) - self.first_scored(prompt) + (said.params.max_new_tokens or 1)
        if self.scores_tokens and positions * len(said.token_ids_logprob) * said.params.n > _MOST_SCORES:
            raise BadRequest(
                f"token_ids_logprob: {len(said.token_ids_logprob)} tokens at up to {positions} positions of "
                f"{said.params.n} samples are over the limit of {_MOST_SCORES} log-probs"
            )
        topk = said.top_logprobs_num if said.return_logprob else 0
        return Asked(
            self.model,
            prompt,
            said.params.message(self.text.end_tokens),
            num_samples=said.params.n,
            topk=topk,
            prompt_logprobs=self.scores_prompt,
            prompt_topk=topk if self.scores_prompt else 0,
            stream=stream,
            prompt_field="text" if isinstance(said.prompt, str) else "input_ids",
        )


@dataclass
class _Sequence:
    """What there is of one sequence, in the course of a stream or at its end."""

    text: SampledText
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    likely: list[Row] = field(default_factory=list)
    scores: tuple[list[Row], list[Row]] | None = None

    def add(self, part: messages.Drawn | messages.SampledSequence, begin: int = 0) -> bool:
        """Tokens from the `begin`-th on; whether some of them are new."""
        tokens = tokens_of(part.tokens)
        if begin + len(tokens) <= len(self.tokens):  # of an engine that began it again
            return False
        self.tokens[begin:], self.logprobs[begin:] = tokens, logprobs_of(part.logprobs)
        self.likely[begin:] = likely_of(part.topk)
        return True


class Answers:
    """`began`: when the request did, by the monotonic clock."""

    def __init__(self, served: ServedSamples, body: Generate, prompts: Sequence[Prompt], began: float):
        self._served = served
        self._body, self._prompts, self._began = body, prompts, began
        self._n = prompts[0].said.params.n
        self._several = body.is_batch or self._n > 1

    async def whole(self, samples: RequestSamples, running: list[Running]) -> bytes:
        """In JSON. Raises ApiError."""
        outputs = await outputs_of(running)
        found = []
        for place, output in enumerate(outputs):
            found += await self._answers(samples, place, running[place], output)
        return b"[" + b",".join(found) + b"]" if self._several else found[0]

    async def events(self, owner: str, running: list[Running]) -> AsyncGenerator[bytes]:
        """Each with all there is so far of one sequence. A sequence whose prompt or other tokens are scored
        comes in one event, because those scores are known last."""
        growing = [
            self._sequence(place, running[place]) for place in range(len(running)) for _ in range(self._n)
        ]
        try:
            async with self._served.of_request(owner) as samples:
                async for place, part in self._served.drawn(running):
                    if isinstance(part, messages.SampleOutput):
                        for answer in await self._answers(samples, place, running[place], part, True):
                            yield b"data: " + answer + b"\n\n"
                        continue
                    prompt, index = self._prompts[place], place * self._n + part.index
                    sequence = growing[index]
                    if prompt.scores_prompt or prompt.scores_tokens or not sequence.add(part, part.begin):
                        continue
                    sequence.text.add(part.begin, tokens_of(part.tokens))
                    meta = self._meta(place, part.index, running[place], sequence, None)
                    growing_answer = self._answer(place, running[place], sequence, sequence.text.told, meta)
                    yield _data(self._numbered(growing_answer, index))
        except ApiError as error:
            yield _error_event(error.status, error.message)
        except Exception as error:
            yield _error_event(500, internal_error("a stream of samples", error))
        yield b"data: [DONE]\n\n"

    async def _answers(
        self,
        samples: RequestSamples,
        place: int,
        running: Running,
        output: messages.SampleOutput,
        in_stream: bool = False,
    ) -> list[bytes]:
        """The JSON of one for each sequence of a prompt."""
        write = partial(self._served.written, samples.owner, [output])
        prompt = self._prompts[place]
        sequences: list[_Sequence] = await write(lambda: self._sequences(place, running, output))
        if prompt.scores_tokens:
            asked, tokens = running.asked, prompt.said.token_ids_logprob
            begin = min(prompt.first_scored(asked.prompt), len(asked.prompt) - 1)
            wanted = [Wanted(asked, each.tokens, tokens, begin) for each in sequences]
            for each, scores in zip(sequences, await score(self._served, samples, wanted), strict=True):
                each.scores = scores
        return await write(lambda: self._written(place, running, output, sequences, in_stream))

    def _sequences(self, place: int, running: Running, output: messages.SampleOutput) -> list[_Sequence]:
        sequences = []
        for drawn in output.sequences:
            sequence = self._sequence(place, running)
            sequence.add(drawn)
            if running.asked.draws_nothing:  # what would have come next
                sequence.likely = likely_of(drawn.topk)
            sequences.append(sequence)
        return sequences

    def _written(
        self,
        place: int,
        running: Running,
        output: messages.SampleOutput,
        sequences: list[_Sequence],
        in_stream: bool,
    ) -> list[bytes]:
        found = []
        for number, (sequence, drawn) in enumerate(zip(sequences, output.sequences, strict=True)):
            reason = self._finish_reason(sequence, drawn.stop_reason)
            meta = self._meta(place, number, running, sequence, reason) | {
                "cached_tokens": output.prompt_cache_hit_tokens,
                "e2e_latency": time.monotonic() - self._began,
            }
            if self._prompts[place].said.return_logprob:
                meta |= self._prompt_scores(place, running.asked, output, sequence)
            text = sequence.text.whole(sequence.tokens, drawn.stop_reason)
            answer = self._answer(place, running, sequence, text, meta)
            if in_stream:
                answer = self._numbered(answer, place * self._n + number)
            found.append(orjson.dumps(answer))
        return found

    def _sequence(self, place: int, running: Running) -> _Sequence:
        prompt, asked = self._prompts[place], running.asked
        params = prompt.said.params
        return _Sequence(
            SampledText(
                prompt.text,
                asked.params.stop_strings,
                asked.params.stop_tokens or [],
                keep_stop=params.no_stop_trim,
                skip_special_tokens=params.skip_special_tokens,
                prompt=asked.prompt,
            )
        )

    def _finish_reason(self, sequence: _Sequence, reason: str) -> dict[str, Any]:
        if reason == "length":
            return {"type": "length", "length": len(sequence.tokens)}
        return {"type": "stop", "matched": sequence.text.matched(sequence.tokens, reason)}

    def _answer(
        self, place: int, running: Running, sequence: _Sequence, text: str, meta: dict[str, Any]
    ) -> dict[str, Any]:
        answer = {"text": text, "output_ids": sequence.tokens, "meta_info": meta}
        if self._body.return_prompt_token_ids:
            answer["prompt_token_ids"] = running.asked.prompt
        return answer

    def _meta(
        self, place: int, number: int, running: Running, sequence: _Sequence, reason: dict[str, Any] | None
    ) -> dict[str, Any]:
        asked, count = running.asked, len(sequence.tokens)
        identifier = self._prompts[place].said.rid or running.operation.request_id
        meta: dict[str, Any] = {
            "id": f"{identifier}_{number}" if self._n > 1 else identifier,
            "finish_reason": reason,
            "prompt_tokens": len(asked.prompt),
            "completion_tokens": count,
            "reasoning_tokens": 0,
            "num_retractions": 0,
            "weight_version": asked.model.version,
            "weight_versions": [{"version": asked.model.version, "start": 0, "end": count}],
        }
        if not self._prompts[place].said.return_logprob:
            return meta
        entries = [self._entry(place, *each) for each in zip(sequence.tokens, sequence.logprobs, strict=True)]
        meta |= {
            "input_token_logprobs": [],
            "output_token_logprobs": entries,
            "output_token_logprobs_length": count,
        }
        if asked.topk:
            rows = [self._row(place, row) for row in sequence.likely]
            meta |= {"input_top_logprobs": [], "output_top_logprobs": rows}
        return meta

    def _prompt_scores(
        self, place: int, asked: Asked, output: messages.SampleOutput, sequence: _Sequence
    ) -> dict[str, Any]:
        """From `logprob_start_len` on. As in SGLang the first of them has none."""
        prompt = self._prompts[place]
        found: dict[str, Any] = {}
        begin = prompt.first_scored(asked.prompt)
        tokens = asked.prompt[begin:]
        if prompt.scores_prompt:
            values = [None, *prompt_logprobs_of(output)[begin + 1 :]][: len(tokens)]
            found["input_token_logprobs"] = [
                self._entry(place, *each) for each in zip(tokens, values, strict=True)
            ]
            if asked.prompt_topk:
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
        text = (
            self._prompts[place].text.decode([token], False) if self._body.return_text_in_logprobs else None
        )
        return [logprob, token, text]

    def _numbered(self, answer: dict[str, Any], index: int) -> dict[str, Any]:
        return answer | ({"index": index} if self._several else {})


def _error_event(status: int, message: str) -> bytes:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return _data({"error": {"message": message, "type": kind, "code": status}})


def _data(body: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"


router = APIRouter(tags=["inference"], route_class=BodyRoute)


@router.post(
    "/generate",
    response_model=None,
    responses=described_as(wire.Generated, events=wire.Generation),
)
async def generate(
    body: Generate,
    request: Request,
    base_models: Provided[BaseModels],
    offload: Provided[Offload],
    served_models: Provided[ServedModels],
    served: Provided[ServedSamples],
    owner: Owner,
) -> Response:
    """One object; a list of several prompts, or of several samples. With `stream` server-sent events, each
    with all there is so far. Closing the connection cancels the samples."""
    return await while_connected(request, _generate(body, base_models, offload, served_models, served, owner))


async def _generate(
    body: Generate,
    base_models: BaseModels,
    offload: Offload,
    served_models: ServedModels,
    served: ServedSamples,
    owner: str,
) -> Response:
    began = time.monotonic()
    named = {}
    prompts, asked = [], []
    for said in body.each:
        if said.model not in named:
            model = await served_models.find(owner, said.model)
            base = base_models.named(model.sampler.base_model)
            text = await asyncio.to_thread(tokenizer.of_folder, base.folder)
            named[said.model] = (
                Prompts(offload, owner, text, base.max_sequence_length),
                (model, base.vocab_size, text),
            )
        of_model, known = named[said.model]
        prompts.append(Prompt(said, *known))
        asked.append(prompts[-1].asked(await of_model.of(said.prompt), body.stream))
    answers = Answers(served, body, prompts, began)
    async with served.of_request(owner) as samples:
        running = await served.submit(samples, asked)
        if body.stream:
            samples.disown()
            return served.streamed(answers.events(owner, running))
        whole = await answers.whole(samples, running)
    return Response(whole, media_type="application/json")
