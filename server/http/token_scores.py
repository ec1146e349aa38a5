"""Log-probs of chosen tokens at every position of a sample, for SGLang's `token_ids_logprob`.

The engine scores chosen tokens at the positions of a prompt. So a sample that has been drawn is sent once
more, as a prompt with its tokens at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...engine import messages
from .request_samples import RequestSamples
from .served_samples import Asked, ServedSamples, answers

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
    outputs = await answers(await served.submit(samples, asked))
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
