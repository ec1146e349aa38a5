"""The sampler's queues: prompts that wait or are being cached, running sequences, and their pages.

Host side only. Requests are served in order of arrival. When memory is short the newest one loses its pages,
and is prefilled again later.
"""

from __future__ import annotations

import bisect
from collections import deque
from itertools import chain, groupby, islice
from typing import NamedTuple

import numpy as np

from .page_pool import PagePool
from .sampler_rows import CONTEXT_BUCKETS, bucket_of
from .sequence import Generation, Prompt, Sequence
from .sequence_states import SequenceStates

_LOOKED_AT = 64  # prompts, when those of a program are chosen


class Copies(NamedTuple):
    """Pages and states to be copied, each with where to, before anything else is written."""

    pages: list[tuple[int, int]]
    states: list[tuple[int, int]]


class SamplingQueue:
    """The stages of prompts and their samples.

    A prompt goes from waiting to prefilling when it has its pages, and to cached when they are filled. Its
    samples then start running one by one, as slots become free.
    """

    def __init__(
        self,
        pool: PagePool,
        max_slots: int,
        decode_steps: int,
        weights_positions: int,
        states: SequenceStates | None = None,
    ):
        """`decode_steps` are the tokens of a decode chunk. `weights_positions`: the number of cached
        positions whose keys and values have as many bytes as the weights. `states` are for models that keep a
        state of every sequence."""
        self.pool = pool
        self._states = states
        self._turn = 0  # decode chunks so far
        self.max_slots = max_slots
        self._decode_steps = decode_steps
        self._weights_positions = weights_positions
        self._waiting: list[Prompt] = []  # oldest request first
        self.prefilling: deque[Prompt] = deque()  # have their pages
        self._cached: deque[Prompt] = deque()  # hold pages for samples that do not run yet
        self.running: list[Sequence] = []

    def add(self, prompt: Prompt) -> None:
        prompt.digests = self.pool.digests(prompt.generation.weights.id, prompt.tokens[: prompt.target])
        bisect.insort(self._waiting, prompt, key=lambda p: p.generation.arrival)

    def drop(self, generation: Generation) -> None:
        """Free the slots and pages of a request."""
        for prompts in (self.prefilling, self._cached):
            for prompt in [p for p in prompts if p.generation is generation]:
                self._release(prompt)
                prompts.remove(prompt)
        self._waiting = [p for p in self._waiting if p.generation is not generation]
        for sequence in [s for s in self.running if s.generation is generation]:
            self._release(sequence)
            self.running.remove(sequence)

    def _release(self, holder: Prompt | Sequence) -> None:
        """Free the pages and the state of a prompt or a sequence."""
        self.pool.release(holder.pages)
        holder.pages = []
        if self._states is not None:
            self._states.release(holder.slot)
            holder.slot = 0

    def _allocate(self, count: int) -> list[int] | None:
        """Allocate pages, also those of prefix states."""
        if self._states is not None:
            self._states.free_pages(count)
        return self.pool.allocate(count)

    # --- from waiting to running -------------------------------------------------------------------------

    def admit(self) -> Copies:
        """Give the oldest waiting prompts their pages, as far as there are any.

        Prompts that are prefilled next also get what was computed for others meanwhile. Returns what is to be
        copied for them.
        """
        if self._states is not None:
            return self._admit_with_states(self._states)
        self._admit_with_pages()
        return Copies([], [])

    def _admit_with_pages(self) -> None:
        for prompt in list(islice(self.prefilling, _LOOKED_AT)):
            self._reuse(prompt)
        while self._waiting:
            prompt = self._waiting[0]
            held = self._find_cached(prompt)
            self.pool.share(held)
            missing = self.pool.pages_for(prompt.target) - len(held)
            # Leave a page for each running sequence, or what is admitted would lose its pages at once.
            enough = self.pool.num_free >= missing + len(self.running)
            fresh = self.pool.allocate(missing) if enough else None
            if fresh is None:
                self.pool.release(held)
                return
            prompt.pages, prompt.num_cached = held + fresh, len(held) * self.pool.page_size
            prompt.generation.cache_hit_tokens = max(prompt.generation.cache_hit_tokens, prompt.num_cached)
            self._waiting.pop(0)
            (self._cached if prompt.is_cached else self.prefilling).append(prompt)

    def _admit_with_states(self, states: SequenceStates) -> Copies:
        """Admit prompts that can begin with cached tokens only where a state was kept."""
        copies = Copies([], [])
        for prompt in list(islice(self.prefilling, _LOOKED_AT)):
            prefix = states.find(prompt)
            if prefix is not None and len(prefix.tokens) > prompt.num_cached:
                self.prefilling.remove(prompt)
                self._release(prompt)
                prompt.num_cached = 0
                self.add(prompt)
        while self._waiting:
            prompt = self._waiting[0]
            prefix = states.find(prompt)
            length = 0 if prefix is None else len(prefix.tokens)
            full, partial = divmod(length, self.pool.page_size)
            held = [] if prefix is None else prefix.pages[:full]
            self.pool.share(held)
            missing = self.pool.pages_for(prompt.target) - full
            states.free_pages(missing + len(self.running))
            enough = self.pool.num_free >= missing + len(self.running)
            slot = states.allocate() if enough else None
            fresh = self.pool.allocate(missing) if slot is not None else None
            if slot is None or fresh is None:
                self.pool.release(held)
                return copies
            if prefix is not None:  # it may be dropped by now: copies are made before anything is written
                copies.states.append((prefix.slot, slot))
                copies.pages.extend([(prefix.pages[full], fresh[0])] if partial else [])
            prompt.pages, prompt.slot, prompt.num_cached = held + fresh, slot, length
            prompt.generation.cache_hit_tokens = max(prompt.generation.cache_hit_tokens, length)
            self._waiting.pop(0)
            (self._cached if prompt.is_cached else self.prefilling).append(prompt)
        return copies

    def _find_cached(self, prompt: Prompt, first_page: int = 0) -> list[int]:
        """Return the cached pages of a prompt from a page on."""
        return self.pool.find(prompt.digests[first_page : prompt.reusable // self.pool.page_size])

    def _reuse(self, prompt: Prompt) -> None:
        """Replace a prompt's pages by equal ones that were published meanwhile."""
        begin = prompt.num_cached // self.pool.page_size
        found = self._find_cached(prompt, begin)
        if not found:
            return
        end = begin + len(found)
        self.pool.share(found)
        self.pool.release(prompt.pages[begin:end])
        prompt.pages[begin:end] = found
        prompt.num_cached = end * self.pool.page_size
        prompt.generation.cache_hit_tokens = max(prompt.generation.cache_hit_tokens, prompt.num_cached)
        if prompt.is_cached:
            self.prefilling.remove(prompt)
            self._cached.append(prompt)

    def next_pieces(self, lengths: list[int]) -> list[tuple[Prompt, int]]:
        """Choose what to prefill next, in rows of these `lengths`, with the number of tokens of each prompt.

        At least one prompt must be prefilling. Short prompts of the same weights run together, or a piece of
        a long one. Whole prompts share a row. Those that continue a cached beginning have a row each, of the
        first one's length and context at most; at least half of the computed tokens are theirs. A prompt that
        begins like one of them waits until that one is cached.
        """
        first, most = self.prefilling[0], lengths[-1]
        if first.missing > most:
            return [(first, most)]
        length, context = bucket_of(lengths, first.missing), bucket_of(CONTEXT_BUCKETS, first.num_cached)
        has_own_row = first.num_cached > 0 or self._states is not None
        most_pieces = most // length if has_own_row else len(self.prefilling)
        pieces, used = [(first, first.missing)], first.missing
        coming = set(self._coming(first))
        for prompt in islice(self.prefilling, 1, _LOOKED_AT):
            if len(pieces) == most_pieces:
                break
            if prompt.generation.weights is not first.generation.weights:
                continue
            if self._states is not None:
                fits = prompt.num_cached <= context and prompt.missing <= length
            elif first.num_cached:
                fits = 0 < prompt.num_cached <= context and prompt.missing <= length
            else:
                fits = prompt.num_cached == 0 and used + prompt.missing <= most
            if fits and not self._waits(prompt, coming):
                pieces.append((prompt, prompt.missing))
                used += prompt.missing
                coming.update(self._coming(prompt))
        return pieces if not has_own_row or 2 * len(pieces) >= most_pieces else pieces[:1]

    def _coming(self, prompt: Prompt) -> list[bytes]:
        """Return the beginnings that others may have from the cache when this prompt is cached."""
        return prompt.digests if self._states is None else [prompt.tokens[: prompt.target].tobytes()]

    def _waits(self, prompt: Prompt, coming: set[bytes]) -> bool:
        """Return whether more of a prompt will come from the cache when those `coming` are cached."""
        if self._states is not None:
            return prompt.reusable == prompt.target and self._coming(prompt)[0] in coming
        next_page = prompt.num_cached // self.pool.page_size
        return next_page < prompt.reusable // self.pool.page_size and prompt.digests[next_page] in coming

    def prefilled(self, prompt: Prompt, count: int) -> None:
        """Note that `count` more tokens of a prompt are in its pages."""
        prompt.num_cached += count
        if prompt.is_cached:
            self.prefilling.remove(prompt)
            self._cached.append(prompt)
            if self._states is None:
                self.pool.publish(prompt.digests, prompt.pages)

    def start_sequences(self) -> Copies:
        """Start samples of cached prompts, as far as there are slots and pages.

        Returns what is to be copied for them.
        """
        copies = Copies([], [])
        while self._cached and len(self.running) < self.max_slots:
            prompt = self._cached[0]
            is_last = len(prompt.sequences) == 1
            own = None if is_last and self._states is None else self._own(prompt)
            if own is None and not is_last and self.running:
                break
            if own is None:  # one sample takes them all; the others, if any, are prefilled again after it
                pages, slot = prompt.pages, prompt.slot
                self._cached.popleft()
                if rest := deque(list(prompt.sequences)[1:]):
                    self.add(Prompt(prompt.generation, rest, prompt.tokens))
            else:
                last_page, slot = own
                shared = prompt.pages[: prompt.target // self.pool.page_size]
                copies.pages.extend(zip(prompt.pages[len(shared) :], last_page, strict=True))
                copies.states.extend([(prompt.slot, slot)] if slot else [])
                pages = shared + last_page
                self.pool.share(shared)
                if is_last and self._states is not None:
                    self._cached.popleft()
                    weights = prompt.generation.weights.id
                    self._states.keep(weights, prompt.tokens[: prompt.target], prompt.slot, prompt.pages)
            sequence = prompt.sequences.popleft()
            sequence.pages, sequence.slot, sequence.last_turn = pages, slot, self._turn
            self.running.append(sequence)
        return copies

    def _own(self, prompt: Prompt) -> tuple[list[int], int] | None:
        """Allocate what each sample of a prompt has for itself: a copy of the last page, if that is partly
        filled, and a slot for its state. None if there is not enough."""
        last_page = self._allocate(1 if prompt.target % self.pool.page_size else 0)
        if last_page is None or self._states is None:
            return None if last_page is None else (last_page, 0)
        slot = self._states.allocate()
        if slot is None:
            self.pool.release(last_page)
            return None
        return last_page, slot

    @property
    def wanted_slots(self) -> int:
        """Return the slots for all samples that run or wait, up to the maximum."""
        wanted = len(self.running)
        for prompt in chain(self.prefilling, self._cached, self._waiting):
            if wanted >= self.max_slots:
                break
            wanted += len(prompt.sequences)
        return min(self.max_slots, wanted)

    # --- running -----------------------------------------------------------------------------------------

    def next_batch(self) -> list[Sequence]:
        """Choose the sequences to decode now, with pages for a chunk.

        These are the ones that waited longest, with others over the same base weights and contexts of similar
        length. None if they gave way to others.
        """
        oldest = min(self.running, key=lambda s: s.last_turn, default=None)
        if oldest is None:
            return []
        base = oldest.generation.weights.base
        chosen = self._read_with(oldest, [s for s in self.running if s.generation.weights.base is base])
        for sequence in chosen:
            if sequence in self.running:  # the sequence may have given way to an older one meanwhile
                self._grow(sequence)
        chosen = [sequence for sequence in chosen if sequence in self.running]
        self._turn += 1
        for sequence in chosen:
            sequence.last_turn = self._turn
        return chosen

    def _read_with(self, oldest: Sequence, sequences: list[Sequence]) -> list[Sequence]:
        """Return the sequences to decode together with the oldest.

        A chunk reads as many positions of each sequence as of the longest. Sequences that are so much shorter
        that this costs more than reading the weights again are left for a chunk of their own.
        """

        def context(sequence: Sequence) -> int:
            return bucket_of(CONTEXT_BUCKETS, self.positions_after_chunk(sequence))

        together: list[Sequence] = []
        longest = more = 0
        for length, group in groupby(sorted(sequences, key=context, reverse=True), context):
            alike = list(group)
            more += (longest - length) * len(alike) if together else 0
            if more > self._weights_positions:
                if oldest in together:
                    break
                together, more = [], 0
            longest = longest if together else length
            together += alike
        return together

    def positions_after_chunk(self, sequence: Sequence) -> int:
        return sequence.num_cached + min(self._decode_steps, sequence.stop.remaining)

    def _grow(self, sequence: Sequence) -> None:
        """Give a running sequence pages for its next chunk, unless it has to give way."""
        while True:
            missing = self.pool.pages_for(self.positions_after_chunk(sequence)) - len(sequence.pages)
            pages = self._allocate(max(missing, 0))
            if pages is not None:
                sequence.pages += pages
                return
            if self.preempt_newest() is sequence:
                return

    def preempt_newest(self) -> Sequence | Prompt:
        """Take the pages of the newest request; it will be prefilled again."""
        holders: list[Prompt | Sequence] = [*self.prefilling, *self._cached, *self.running]
        newest = max(holders, key=lambda h: (h.generation.arrival, getattr(h, "index", -1)))
        self._release(newest)
        if isinstance(newest, Sequence):
            self.running.remove(newest)
            self.add(Prompt.of_sequence(newest))
        else:
            (self.prefilling if newest in self.prefilling else self._cached).remove(newest)
            newest.num_cached = 0
            self.add(newest)
        return newest

    def start_over(self) -> None:
        """Take all pages, because the arrays behind them are lost: everything will be prefilled again."""
        while self.prefilling or self._cached or self.running:
            self.preempt_newest()
        self.pool.forget()
        if self._states is not None:
            self._states.forget()

    def finish(self, sequence: Sequence) -> None:
        """Free the slot of a sequence that has ended, and publish its full pages."""
        self.running.remove(sequence)
        cached = np.array(sequence.tokens[: sequence.num_cached], np.int32)
        if self._states is not None:
            if sequence.state_goes_on:
                self._release(sequence)
            else:
                self._states.keep(sequence.generation.weights.id, cached, sequence.slot, sequence.pages)
            return
        self.pool.publish(self.pool.digests(sequence.generation.weights.id, cached), sequence.pages)
        self.pool.release(sequence.pages)
