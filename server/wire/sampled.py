"""The engine's bytes of samples as numbers."""

from __future__ import annotations

import numpy as np

from ...engine import messages


def tokens_of(encoded: bytes) -> list[int]:
    return np.frombuffer(encoded, "<i4").tolist()


def logprobs_of(encoded: bytes) -> list[float]:
    return np.frombuffer(encoded, "<f4").tolist()


def prompt_logprobs_of(output: messages.SampleOutput) -> list[float | None]:
    """Of each token of the prompt; the first has none."""
    values: list[float | None] = [*logprobs_of(output.prompt_logprobs or b"")]
    return [None, *values[1:]]


def likely_of(topk: messages.TopK | None) -> list[list[tuple[int, float]]]:
    """Of each drawn token the most likely ones and their log-probs."""
    if topk is None:
        return []
    ids = np.frombuffer(topk.token_ids, "<i4").reshape(topk.length, topk.k).tolist()
    values = np.frombuffer(topk.logprobs, "<f4").reshape(topk.length, topk.k).tolist()
    return [
        [pair for pair in zip(*row, strict=True) if pair[1] != messages.EMPTY_LOGPROB]
        for row in zip(ids, values, strict=True)
    ]
