"""Arguments of the sampler's programs, as arrays in buckets of shapes, from prompts and sequences."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from ...model.decode import DecodeRows
from ...model.penalties import PenaltyRows
from ...model.prefill_rows import PrefillRows
from ...model.token_sampling import SamplingRows, float32_temperature, uniforms
from .sequence import Prompt, Sequence
from .stop import LOOKED_AT

SLOT_BUCKETS = (1, 4, 16, 32, 64, 128, 256)  # each is a program, which takes seconds to compile
CONTEXT_BUCKETS = tuple(192 << doublings for doublings in range(13))  # up to 786,432 positions
PREFILL_BUCKETS = (64, 128, 256, 1024, 4096)  # tokens of a row of prompts
TARGET_BUCKETS = (1, 8, 64, 512, 4097)  # tokens scored per prompt position
DRAW_BUCKETS = (0, 4, 16, 64)  # tokens drawn per prompt position
_INT32_MAX = np.iinfo(np.int32).max


def bucket_of(buckets: Iterable[int], size: int) -> int:
    """Return the smallest bucket that holds `size`."""
    return min(bucket for bucket in buckets if bucket >= size)


def prefill_rows(
    pieces: list[tuple[Prompt, int]],
    lengths: list[int],
    page_size: int,
    context_pages: int,
    has_states: bool = False,
) -> tuple[PrefillRows, list[slice]]:
    """Return the next `count` tokens of each prompt, and their places, row after row.

    Whole prompts lie side by side in one row (`context_pages` 0). Those that continue their cached beginnings
    have a row each, with tables of `context_pages`: one row, or all that have `lengths[-1]` tokens together.
    """
    counts = [count for _, count in pieces]
    T = bucket_of(lengths, max(counts) if context_pages else sum(counts))
    S = lengths[-1] // T if len(pieces) > 1 and context_pages else 1
    tokens, position, page, offset = (np.zeros((S, T), np.int32) for _ in range(4))
    start = np.tile(np.arange(T, dtype=np.int32), (S, 1))  # padding attends to itself
    table, context, slot = np.zeros((S, context_pages), np.int32), *np.zeros((2, S), np.int32)
    places, end = [], 0
    for index, (prompt, count) in enumerate(pieces):
        row, at = (index, 0) if context_pages else (0, end)
        here, end = slice(at, at + count), at + count
        position[row, here] = prompt.num_cached + np.arange(count)
        tokens[row, here] = prompt.tokens[prompt.num_cached : prompt.num_cached + count]
        start[row, here] = at
        page[row, here] = np.array(prompt.pages, np.int32)[position[row, here] // page_size]
        offset[row, here] = position[row, here] % page_size
        context[row], slot[row] = prompt.num_cached, prompt.slot
        cached = prompt.pages[: -(-prompt.num_cached // page_size)]
        table[row, : len(cached)] = cached
        places.append(slice(row * T + at, row * T + at + count))
    slots = slot if has_states else None
    return PrefillRows(tokens, position, start, page, offset, table, context, slots), places


def decode_rows(
    chosen: list[Sequence],
    adapter: list[int],
    slots: int,
    page_size: int,
    context_pages: int,
    steps: int,
    has_states: bool = False,
) -> DecodeRows:
    """Return a row for each of `chosen`, and empty ones up to `slots`; `adapter` is each one's index in the
    stack."""
    S, P = slots, context_pages

    def column(dtype: Any, values: list, *shape: int) -> np.ndarray:
        array = np.zeros((S, *shape), dtype)
        array[: len(values)] = np.array(values, dtype).reshape(len(values), *shape)
        return array

    table = np.zeros((S, P), np.int32)
    stop_tokens = np.full((S, LOOKED_AT), -1, np.int32)
    u = np.zeros((steps, S, 2), np.float32)
    for row, sequence in enumerate(chosen):
        u[:, row] = uniforms(sequence.generation.seed, sequence.index, len(sequence.tokens), steps)
        pages = sequence.pages[:P]
        table[row, : len(pages)] = pages
        stop_tokens[row, : len(sequence.stop.looked_at)] = sequence.stop.looked_at
    params = [s.generation.request.params for s in chosen]
    sampling = SamplingRows(
        temperature=column(np.float32, [float32_temperature(p.temperature) for p in params]),
        top_k=column(np.int32, [min(p.top_k, _INT32_MAX) if p.temperature > 0 else -1 for p in params]),
        top_p=column(np.float32, [p.top_p if p.temperature > 0 else 1.0 for p in params]),
        min_p=column(np.float32, [p.min_p if p.temperature > 0 else 0.0 for p in params]),
    )
    return DecodeRows(
        last_token=column(np.int32, [s.tokens[-1] for s in chosen]),
        position=column(np.int32, [s.num_cached for s in chosen]),
        table=table,
        adapter=column(np.int32, adapter),
        budget=column(np.int32, [s.stop.remaining for s in chosen]),
        stop_tokens=stop_tokens,
        sampling=sampling,
        u=u,
        penalties=_penalty_rows(chosen, S, P * page_size) if any(map(is_penalized, chosen)) else None,
        slot=column(np.int32, [s.slot for s in chosen]) if has_states else None,
    )


def is_filtered(sequence: Sequence) -> bool:
    """Return whether a row needs the largest logits, for its filters or to report them."""
    request = sequence.generation.request
    params = request.params
    has_filter = params.temperature > 0 and (params.top_k > 0 or params.top_p < 1)
    return has_filter or request.topk_sample_logprobs > 0


def is_penalized(sequence: Sequence) -> bool:
    params, off = sequence.generation.request.params, (1.0, 0.0, 0.0)
    return (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != off


def _penalty_rows(chosen: list[Sequence], slots: int, context_tokens: int) -> PenaltyRows:
    """Return the rows for penalties, empty for sequences without."""
    rows = PenaltyRows(
        repetition=np.ones(slots, np.float32),
        presence=np.zeros(slots, np.float32),
        frequency=np.zeros(slots, np.float32),
        tokens=np.zeros((slots, context_tokens), np.int32),
        prompt_length=np.zeros(slots, np.int32),
        length=np.zeros(slots, np.int32),
    )
    for row, sequence in enumerate(chosen):
        params = sequence.generation.request.params
        if not is_penalized(sequence):
            continue
        rows.repetition[row] = params.repetition_penalty
        rows.presence[row] = params.presence_penalty
        rows.frequency[row] = params.frequency_penalty
        rows.tokens[row, : len(sequence.tokens)] = sequence.tokens
        rows.prompt_length[row] = len(sequence.generation.prompt)
        rows.length[row] = len(sequence.tokens)
    return rows
