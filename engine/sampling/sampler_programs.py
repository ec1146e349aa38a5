"""The sampler's programs, by bucket of shapes, and the arrays of the pages that they work on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np

from ...model import decode, kv_cache, prefill
from ...model.config import ModelConfig
from ...model.decode import Decoded
from ...model.kernels.backends import Backend
from ...model.sharding import replicated
from ...model.token_sampling import Drawing
from ..budget import Budget
from ..compilation import compiling
from ..messages import RoutedExperts
from .prompt_scores import PromptScores
from .sampler_rows import (
    CONTEXT_BUCKETS,
    DRAW_BUCKETS,
    PREFILL_BUCKETS,
    TARGET_BUCKETS,
    bucket_of,
    decode_rows,
    is_filtered,
    is_penalized,
    prefill_rows,
)
from .sampler_weights import AdapterStacks
from .sampling_queue import Copies
from .sequence import Prompt, Sequence
from .slots import Slots

PyTree = Any

_COPIED_AT_ONCE = 16
_STATES_AT_ONCE = 4


class SamplerPrograms:
    """Prefill, score, decode and copy, on one set of pages, under the mesh if there is one."""

    def __init__(
        self,
        graph: Any,
        config: ModelConfig,
        *,
        dtype: Any,
        num_pages: int,
        num_slots: int,
        page_size: int,
        longest: int,
        prefill_tokens: int,
        decode_steps: int,
        mesh: Any,
        budget: Budget,
        backend: Backend,
        on_compile: Callable[[str, float], None] | None,
    ):
        """`longest` is the most positions that a sequence may have. `num_pages` counts page 0, and
        `num_slots` slot 0 of the states."""
        self._graph, self._config = graph, config
        self._dtype = dtype
        self._num_pages, self._num_slots, self._page_size = num_pages, num_slots, page_size
        self._longest = longest
        self.prefill_lengths = [t for t in PREFILL_BUCKETS if t < prefill_tokens] + [prefill_tokens]
        self._decode_steps = decode_steps
        self._mesh, self._backend = mesh, backend
        self._on_compile = on_compile or (lambda name, seconds: None)
        self._compiled: set[str] = set()
        self._slots = Slots()
        self._cache: kv_cache.Cache | None = None  # made when first needed
        self._prefilled: jax.Array | None = None  # of the last prompts, on an accelerator
        decoded_as = None if backend == "cpu" else dtype
        self.stacks = AdapterStacks(config, budget, None if mesh is None else replicated(mesh), decoded_as)

    @contextlib.contextmanager
    def ready(self) -> Any:
        """Return a context under the mesh, in which there are pages."""
        with contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh):
            if self._cache is None:
                self._cache = kv_cache.make_cache(
                    self._config,
                    self._num_pages,
                    self._page_size,
                    self._dtype,
                    self._mesh,
                    self._backend,
                    self._num_slots,
                )
            yield

    def shorten_prefill(self) -> bool:
        """Take fewer prompt tokens per call from now on; return False if that is impossible."""
        if len(self.prefill_lengths) == 1:
            return False
        self.prefill_lengths.pop()
        return True

    def fewer_slots(self, sequences: int) -> int | None:
        """Decode fewer than so many sequences per call from now on; return how many, or None for one."""
        return self._slots.fewer(sequences)

    def drop_pages(self) -> None:
        """Free the pages; `ready` makes new ones, which are empty."""
        self._cache = self._prefilled = None

    def copy(self, copies: Copies) -> None:
        """Copy pages to pages, and states to states."""
        for program, numbers, at_once in (
            (kv_cache.copy_pages, copies.pages, _COPIED_AT_ONCE),
            (kv_cache.copy_states, copies.states, _STATES_AT_ONCE),
        ):
            for begin in range(0, len(numbers), at_once):
                piece = numbers[begin : begin + at_once]
                piece += [(0, 0)] * (at_once - len(piece))
                source, target = (np.array(each, np.int32) for each in zip(*piece, strict=True))
                self._cache = program(self._cache, source, target)

    def prefill(self, pieces: list[tuple[Prompt, int]]) -> list[bool]:
        """Run the next tokens of each prompt (`SamplingQueue.next_pieces`), and score the tokens after them.

        Returns, per piece, False if a log-prob is not finite.
        """
        weights, cached = pieces[0][0].generation.weights, max(prompt.num_cached for prompt, _ in pieces)
        has_states = self._config.has_states
        context = self._context_pages(cached) if cached or has_states else 0
        rows, places = prefill_rows(pieces, self.prefill_lengths, self._page_size, context, has_states)
        stack = self.stacks.of([weights])[0].stacked
        S, T = rows.tokens.shape
        name = f"prefill {S} x {T} tokens after {context * self._page_size}{_kind(stack)}"
        with self._timed(name):
            self._cache, hidden = prefill.prefill(
                self._graph, weights.base_for_prompts, self._cache, stack, rows
            )
            self._wait_for(hidden)
        return self._score(pieces, places, weights.base, stack, hidden)

    def _wait_for(self, hidden: jax.Array) -> None:
        """Wait for a chunk of prompts on a CPU, and for the chunk before it on an accelerator, which then
        computes while the host prepares."""
        previous, self._prefilled = self._prefilled, hidden
        waited_for = hidden if self._backend == "cpu" else previous
        if waited_for is not None:
            waited_for.block_until_ready()

    def _score(
        self,
        pieces: list[tuple[Prompt, int]],
        places: list[slice],
        base: PyTree,
        stack: PyTree,
        hidden: jax.Array,
    ) -> list[bool]:
        asked: list[tuple[int, slice, int, PromptScores]] = []  # piece, its tokens, position, scores
        for number, ((prompt, count), place) in enumerate(zip(pieces, places, strict=True)):
            scores, first = prompt.generation.scores, prompt.num_cached + 1
            if prompt.is_scored and first + count > scores.first_position:
                asked.append((number, place, first, scores))
        if not asked:
            return [True] * len(pieces)
        T = hidden.shape[0]
        width = max(scores.width(first, at.stop - at.start) for _, at, first, scores in asked)
        draws = max(scores.draws for *_, scores in asked)
        tokens = np.zeros((T, bucket_of(TARGET_BUCKETS, width)), np.int32)
        u = np.zeros((T, bucket_of(DRAW_BUCKETS, draws), 2), np.float32)
        temperature = np.zeros(T, np.float32)
        for _, at, first, scores in asked:
            scores.write_to(tokens[at], u[at], temperature[at], first)
        want_top = np.bool_(any(scores.wants_top for *_, scores in asked))
        with self._timed(f"score {tokens.shape[1]} and {u.shape[1]} of {T} tokens{_kind(stack)}"):
            computed = jax.device_get(prefill.score(base, stack, hidden, tokens, want_top, temperature, u))
        finite = [True] * len(pieces)
        for number, at, first, scores in asked:
            finite[number] = scores.set(first, jax.tree.map(lambda x, at=at: x[at], computed))
        return finite

    def experts_of(self, sequence: Sequence) -> RoutedExperts:
        """Return the experts of a sequence's tokens, as they were chosen when its pages were filled."""
        read = []
        for begin in range(0, len(sequence.pages), _COPIED_AT_ONCE):
            piece = sequence.pages[begin : begin + _COPIED_AT_ONCE]
            padded = np.array(piece + [0] * (_COPIED_AT_ONCE - len(piece)), np.int32)
            read.append(np.asarray(kv_cache.experts_in(self._cache, padded))[: len(piece)])
        positions = np.concatenate(read)
        experts = positions.reshape(-1, *positions.shape[2:])[: sequence.num_cached]
        dtype: Literal["uint8", "uint16"] = "uint8" if experts.dtype == np.uint8 else "uint16"
        tokens, layers, chosen = experts.shape
        return RoutedExperts(
            experts.astype(f"<u{experts.itemsize}").tobytes(), dtype, (tokens, layers, chosen)
        )

    def take_slot_counts(self) -> tuple[int, int]:
        return self._slots.take_counts()

    def decode(self, chosen: list[Sequence], positions: int, soon: int) -> Decoded:
        """Decode a few tokens of each sequence (`SamplingQueue.next_batch`) and return them on the host.

        No sequence will have more than `positions`. Including those that wait there are `soon` sequences.
        """
        stack, adapter = self.stacks.of([s.generation.weights for s in chosen])
        pages = self._context_pages(positions)
        penalties = " with penalties" if any(map(is_penalized, chosen)) else ""
        drawing = self._drawing(chosen)
        filtered = " with filters" if drawing is Drawing.FILTERED else ""
        kind = f"over {pages * self._page_size}{penalties}{filtered}{_kind(stack.stacked)}"
        slots = self._slots.choose(kind, len(chosen), soon)
        has_states = self._config.has_states
        rows = decode_rows(chosen, adapter, slots, self._page_size, pages, self._decode_steps, has_states)
        want_top = np.bool_(any(s.generation.request.topk_sample_logprobs > 0 for s in chosen))
        base = chosen[0].generation.weights.base_by_layer
        began = time.monotonic()
        with self._timed(f"decode {slots} slots {kind}"):
            self._cache, decoded = decode.decode(
                self._graph, base, self._cache, stack.by_layer, rows, want_top, drawing
            )
            decoded = jax.device_get(decoded)
        self._slots.ran(kind, len(chosen), slots, time.monotonic() - began)
        return decoded

    def _drawing(self, chosen: list[Sequence]) -> Drawing:
        """Choose how to draw: accelerators have a program for rows without filters, and one without
        branches."""
        if self._backend == "cpu":
            return Drawing.AT_RUN_TIME
        return Drawing.FILTERED if any(map(is_filtered, chosen)) else Drawing.PLAIN

    def _context_pages(self, positions: int) -> int:
        """Return the table columns for that many positions: the bucket's, at most the model's longest."""
        return -(-min(bucket_of(CONTEXT_BUCKETS, positions), self._longest) // self._page_size)

    @contextlib.contextmanager
    def _timed(self, program: str) -> Any:
        if program in self._compiled:
            yield
            return
        began = time.monotonic()
        with compiling(program):
            yield
        self._compiled.add(program)
        self._on_compile(program, time.monotonic() - began)


def _kind(stack: PyTree | None) -> str:
    """Return the part of a program's name that states its adapters' shapes."""
    if stack is None:
        return ""
    n = len(stack["scale"])
    leaves = jax.tree_util.tree_leaves_with_path(stack)
    ranks = sorted({leaf.shape[-1] for path, leaf in leaves if path[-1].key == "a"})
    names = "+".join(dict.fromkeys(path[-2].key for path, _ in leaves if len(path) > 1))
    return f", {n} adapter{'s' if n > 1 else ''} of rank {ranks} on {names}"
