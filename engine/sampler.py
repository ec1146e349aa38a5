"""Continuous batching: many requests share decode steps, joining and leaving between short chunks.

A request is prefilled once, in chunks, whatever its number of samples; its samples then share the full
pages of the prompt and join the running set. `step` runs one unit of work (a prefill chunk or a decode chunk
of a few tokens), so that the engine can look at its socket and train in between. When memory is short the
newest request loses its pages and is prefilled again later; its random draws depend on its seed and the
token's position only, so it goes on as if nothing had happened.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ..model import decode, kv_cache
from ..model.config import ModelConfig
from ..model.sharding import replicated
from . import messages
from .page_pool import PagePool
from .prompt_scores import PromptScores
from .sample_checks import check_request
from .sampler_rows import (
    CONTEXT_BUCKETS,
    DRAW_BUCKETS,
    SLOT_BUCKETS,
    TARGET_BUCKETS,
    bucket_of,
    decode_rows,
    prefill_row,
)
from .sampler_weights import AdapterStacks, Weights
from .sequence import Generation, Prompt, Sequence, seed_of
from .stop import StopReason, StopRule, implicit_stop_tokens
from .tokenizer import TokenBytes

log = logging.getLogger(__name__)

PyTree = Any

_COPIED_AT_ONCE = 16


class Sampler:
    """Samples from one base model with any number of adapters (or full weights) on top of it.

    `base` and `graph` are those of `model.decoder.build`/`model.load`; they are only read. Weights are
    registered under a key and never change: the key None is the base model itself.
    """

    def __init__(
        self,
        graph: Any,
        base: PyTree,
        config: ModelConfig,
        *,
        token_bytes: TokenBytes | None = None,
        mesh: Any = None,
        kv_cache_tokens: int | None = None,
        max_sequence_length: int | None = None,
        max_slots: int = 64,
        page_size: int = 64,
        prefill_tokens: int = 512,
        decode_steps: int = 16,
        on_compile: Callable[[str, float], None] | None = None,
    ):
        """`kv_cache_tokens` bounds the memory for keys and values (None: derived from the device);
        `max_sequence_length` is the longest prompt + sample (None: the model's). `prefill_tokens` is a
        multiple of `page_size`. `on_compile(name, seconds)` is called when a program ran for the first time.
        """
        self._graph, self._config = graph, config
        self._token_bytes = token_bytes
        self._mesh = mesh
        self._dtype = base["embed_tokens"]["weight"].dtype
        self._max_length = max_sequence_length or config.max_sequence_length
        self._max_slots = max_slots
        self._page_size = page_size
        self._prefill_buckets = [t for t in (64, 256, 1024) if t < prefill_tokens] + [prefill_tokens]
        self._decode_steps = decode_steps
        self._on_compile = on_compile or (lambda name, seconds: None)
        self._compiled: set[str] = set()

        tokens = kv_cache_tokens or default_kv_cache_tokens(config, self._dtype, self._max_length)
        self._num_pages = 1 + max(1, tokens // page_size)
        self._pool = PagePool(self._num_pages, page_size)
        self._longest = min(self._max_length, self._pool.capacity)
        self._pages: kv_cache.Pages | None = None  # made when first needed

        self._weights: dict[str | None, Weights] = {None: Weights(base, decode.by_layer(base))}
        self._stacks = AdapterStacks(None if mesh is None else replicated(mesh))
        self._arrivals = 0
        self._turns = 0
        self._generations: dict[str, Generation] = {}
        self._waiting: list[Prompt] = []  # oldest request first
        self._prefilling: deque[Prompt] = deque()  # have their pages
        self._cached: deque[Prompt] = deque()  # hold pages for samples that do not run yet
        self._running: list[Sequence] = []
        self._prefilled_last = False

    # --- weights -----------------------------------------------------------------------------------------

    def register(
        self, key: str, adapter: PyTree | None = None, *, scale: float = 1.0, base: PyTree | None = None
    ) -> None:
        """Make weights known under `key`: an adapter (`model.lora`; scale = alpha / true rank) on the shared
        base, or the full weights `base`. The arrays are copied: what training does to its own later has no
        effect. Registering a known key raises ValueError."""
        if key in self._weights:
            raise ValueError(f"sampler weights {key!r} are already registered")
        copy = functools.partial(jax.tree.map, functools.partial(jnp.array, copy=True))
        if base is not None:
            own = copy(base)
            self._weights[key] = Weights(own, decode.by_layer(own))
            return
        shared = self._weights[None]
        adapter = copy(adapter)
        if self._mesh is not None:
            adapter = jax.device_put(adapter, replicated(self._mesh))
        self._weights[key] = Weights(shared.base, shared.base_by_layer, adapter, scale)

    def release(self, key: str) -> None:
        """Forget the weights of `key` (unknown: nothing happens). Requests already added still finish."""
        if (weights := self._weights.pop(key, None)) is not None:
            self._stacks.forget(weights)

    def weights_of(self, key: str) -> Weights:
        """What is registered under `key`."""
        return self._weights[key]

    def __contains__(self, key: str) -> bool:
        """Whether weights are registered under `key`."""
        return key in self._weights

    # --- requests ----------------------------------------------------------------------------------------

    def add(self, request: messages.Sample, key: str | None = None) -> None:
        """Queue a request for the weights `key` (None: the base model). `request.sampler` is not read.

        Raises UserError if the request cannot be served (empty or too long a prompt, a token outside the
        vocabulary, bad parameters), KeyError if `key` is not registered."""
        weights = self._weights[key]
        prompt = np.frombuffer(request.prompt, np.int32)
        if request.request_id in self._generations:
            raise ValueError(f"request {request.request_id} is already running")
        longest = self._longest
        check_request(request, prompt, self._config.vocab_size, longest, self._token_bytes is not None)
        params = request.params
        # The last token sampled is never fed back, so it needs no position of its own.
        room = longest + 1 - len(prompt)
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        stop_tokens = implicit_stop_tokens(
            params.stop_tokens, params.stop_strings, self._config.eos_token_ids
        )
        seed = seed_of(params.seed)
        generation = Generation(
            request=request,
            weights=weights,
            arrival=self._arrivals,
            prompt=prompt,
            seed=seed,
            scores=PromptScores(request, prompt, seed),
        )
        self._arrivals += 1
        sequences = (
            Sequence(
                generation,
                index,
                StopRule(stop_tokens, params.stop_strings, max_tokens, self._token_bytes),
                prompt.tolist(),
            )
            for index in range(request.num_samples)
        )
        self._generations[request.request_id] = generation
        self._waiting.append(Prompt(generation, deque(sequences), prompt))

    def cancel(self, request_id: str) -> bool:
        """Drop a request and free its slots and memory at once; False if it is not here (any more)."""
        generation = self._generations.pop(request_id, None)
        if generation is None:
            return False
        for prompts in (self._prefilling, self._cached):
            for prompt in [p for p in prompts if p.generation is generation]:
                self._pool.release(prompt.pages)
                prompts.remove(prompt)
        self._waiting = [p for p in self._waiting if p.generation is not generation]
        for sequence in [s for s in self._running if s.generation is generation]:
            self._pool.release(sequence.pages)
            self._running.remove(sequence)
        return True

    @property
    def has_work(self) -> bool:
        return bool(self._generations)

    def step(self) -> list[messages.Done | messages.Failed]:
        """Run one unit of work and return the answers of the requests that it finished, in no special order.

        Prefill and decode chunks alternate where there is both. A request whose weights give non-finite
        log-probs is answered with Failed (category user); any other exception is a fault of ours and leaves
        the sampler unusable."""
        if not self.has_work:
            return []
        with contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh):
            if self._pages is None:
                self._pages = self._make_pages()
            self._admit()
            self._start_sequences()
            if self._prefilling and not (self._running and self._prefilled_last):
                self._prefilled_last = True
                return self._prefill()
            self._prefilled_last = False
            return self._decode()

    # --- memory ------------------------------------------------------------------------------------------

    def _make_pages(self) -> kv_cache.Pages:
        return kv_cache.make_pages(self._config, self._num_pages, self._page_size, self._dtype, self._mesh)

    def _pages_for(self, positions: int) -> int:
        return -(-positions // self._page_size)

    def _admit(self) -> None:
        """Give the oldest waiting prompts their pages, as far as there are any."""
        while self._waiting:
            prompt = self._waiting[0]
            held = self._find_cached(prompt)
            self._pool.share(held)
            missing = self._pages_for(prompt.target) - len(held)
            # Leave a page for each running sequence, or what is admitted would lose its pages at once.
            enough = self._pool.num_free >= missing + len(self._running)
            fresh = self._pool.allocate(missing) if enough else None
            if fresh is None:
                self._pool.release(held)
                return
            prompt.pages, prompt.num_cached = held + fresh, len(held) * self._page_size
            prompt.generation.cache_hit_tokens = max(prompt.generation.cache_hit_tokens, prompt.num_cached)
            self._waiting.pop(0)
            (self._cached if prompt.is_cached else self._prefilling).append(prompt)

    def _find_cached(self, prompt: Prompt) -> list[int]:
        end = prompt.target
        if prompt.is_scored:  # the token before the first that is asked about must be computed
            end = prompt.generation.scores.first_position - 1
        return self._pool.find(prompt.generation.weights.id, prompt.tokens[:end])

    def _start_sequences(self) -> None:
        """Let samples of cached prompts run, as far as there are slots and pages."""
        copies: list[tuple[int, int]] = []
        while self._cached and len(self._running) < self._max_slots:
            prompt = self._cached[0]
            shared, partial = divmod(prompt.target, self._page_size)
            if len(prompt.sequences) == 1:
                pages = prompt.pages
                self._cached.popleft()
            else:
                own = self._pool.allocate(1) if partial else []
                if own is None and self._running:
                    break
                if own is None:  # one sample may take them all; the others are prefilled again after it
                    pages = prompt.pages
                    self._cached.popleft()
                    rest = deque(list(prompt.sequences)[1:])
                    self._wait(Prompt(prompt.generation, rest, prompt.tokens))
                else:
                    copies += zip(prompt.pages[shared:], own, strict=True)
                    pages = prompt.pages[:shared] + own
                    self._pool.share(pages[:shared])
            sequence = prompt.sequences.popleft()
            sequence.pages = pages
            self._running.append(sequence)
        for begin in range(0, len(copies), _COPIED_AT_ONCE):
            piece = copies[begin : begin + _COPIED_AT_ONCE]
            piece += [(0, 0)] * (_COPIED_AT_ONCE - len(piece))
            source, target = (np.array(pages, np.int32) for pages in zip(*piece, strict=True))
            self._pages = kv_cache.copy_pages(self._pages, source, target)

    def _grow(self, sequence: Sequence) -> bool:
        """Give a running sequence pages for its next chunk; False if it had to give way itself."""
        while True:
            missing = self._pages_for(self._positions_after_chunk(sequence)) - len(sequence.pages)
            pages = self._pool.allocate(max(missing, 0))
            if pages is not None:
                sequence.pages += pages
                return True
            if self._preempt_newest() is sequence:
                return False

    def _positions_after_chunk(self, sequence: Sequence) -> int:
        return sequence.num_cached + min(self._decode_steps, sequence.stop.remaining)

    def _preempt_newest(self) -> Sequence | Prompt:
        """Take the pages of the newest request's newest holder; it will be prefilled again."""
        holders: list[Prompt | Sequence] = [*self._prefilling, *self._cached, *self._running]
        newest = max(holders, key=lambda h: (h.generation.arrival, getattr(h, "index", -1)))
        self._pool.release(newest.pages)
        if isinstance(newest, Sequence):
            self._running.remove(newest)
            newest.pages = []
            tokens = np.array(newest.tokens, np.int32)
            self._wait(Prompt(newest.generation, deque([newest]), tokens))
        else:
            (self._prefilling if newest in self._prefilling else self._cached).remove(newest)
            newest.pages, newest.num_cached = [], 0
            self._wait(newest)
        return newest

    def _wait(self, prompt: Prompt) -> None:
        bisect.insort(self._waiting, prompt, key=lambda p: p.generation.arrival)

    # --- units of work -----------------------------------------------------------------------------------

    def _prefill(self) -> list[messages.Done | messages.Failed]:
        """One row of prompt tokens: whole short prompts side by side, or a piece of a long one."""
        began = time.monotonic()
        first = self._prefilling[0]
        pieces = [(first, min(first.target - first.num_cached, self._prefill_buckets[-1]))]
        used = pieces[0][1]
        if first.num_cached == 0 and used == first.target:
            for prompt in list(self._prefilling)[1:]:
                fits = used + prompt.target <= self._prefill_buckets[-1]
                if fits and prompt.num_cached == 0 and prompt.generation.weights is first.generation.weights:
                    pieces.append((prompt, prompt.target))
                    used += prompt.target
        weights = first.generation.weights
        context = self._context_pages(first.num_cached) if first.num_cached else 0
        row = prefill_row(pieces, bucket_of(self._prefill_buckets, used), self._page_size, context)
        stack, _ = self._stacks.of([weights])
        name = f"prefill {len(row.tokens)} tokens after {len(row.table) * self._page_size}{_kind(stack)}"
        with self._timed(name):
            self._pages, hidden = decode.prefill(self._graph, weights.base, self._pages, stack, row)
            hidden.block_until_ready()
        finite = self._score(pieces, hidden, stack)
        seconds = (time.monotonic() - began) / len(pieces)
        failed: list[messages.Done | messages.Failed] = []
        for (prompt, count), is_finite in zip(pieces, finite, strict=True):
            prompt.num_cached += count
            prompt.generation.device_seconds += seconds
            if prompt.is_cached:
                self._prefilling.remove(prompt)
                self._cached.append(prompt)
                self._publish(prompt.generation, prompt.tokens[: prompt.target], prompt.pages)
            if not is_finite:
                failed.append(self._fail_not_finite(prompt.generation))
        return failed

    def _score(self, pieces: list[tuple[Prompt, int]], hidden: Any, stack: PyTree) -> list[bool]:
        """Answer what the prompts' requests ask about the tokens that follow this row's; per piece, False if
        a log-prob is not finite."""
        asked: list[tuple[int, slice, int, PromptScores]] = []  # piece, row's tokens, position, scores
        begin = 0
        for number, (prompt, count) in enumerate(pieces):
            scores, first = prompt.generation.scores, prompt.num_cached + 1
            if prompt.is_scored and first + count > scores.first_position:
                asked.append((number, slice(begin, begin + count), first, scores))
            begin += count
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
        base = pieces[0][0].generation.weights.base
        with self._timed(f"score {tokens.shape[1]} and {u.shape[1]} of {T} tokens{_kind(stack)}"):
            computed = jax.device_get(
                decode.score(self._graph, base, stack, hidden, tokens, want_top, temperature, u)
            )
        finite = [True] * len(pieces)
        for number, at, first, scores in asked:
            finite[number] = scores.set(first, jax.tree.map(lambda x, at=at: x[at], computed))
        return finite

    def _decode(self) -> list[messages.Done | messages.Failed]:
        """A few tokens for running sequences that share base weights."""
        began = time.monotonic()
        chosen = self._next_batch()
        for sequence in chosen:
            if sequence in self._running:  # it may have given way to an older one meanwhile
                self._grow(sequence)
        chosen = [sequence for sequence in chosen if sequence in self._running]
        if not chosen:
            return []
        self._turns += 1
        stack, adapter = self._stacks.of([s.generation.weights for s in chosen])
        pages = self._context_pages(max(self._positions_after_chunk(s) for s in chosen))
        slots = bucket_of(SLOT_BUCKETS, len(chosen))
        rows = decode_rows(chosen, adapter, slots, self._page_size, pages, self._decode_steps)
        want_top = np.bool_(any(s.generation.request.topk_sample_logprobs > 0 for s in chosen))
        base = chosen[0].generation.weights.base_by_layer
        penalties = "" if rows.penalties is None else " with penalties"
        name = f"decode {slots} slots over {pages * self._page_size}{penalties}{_kind(stack)}"
        with self._timed(name):
            self._pages, decoded = decode.decode(self._graph, base, self._pages, stack, rows, want_top)
            decoded = jax.device_get(decoded)
        seconds = (time.monotonic() - began) / len(chosen)
        answers: list[messages.Done | messages.Failed] = []
        for row, sequence in enumerate(chosen):
            sequence.last_turn = self._turns
            generation = sequence.generation
            generation.device_seconds += seconds
            if generation.request.request_id not in self._generations:
                continue  # another sample of it failed just now
            reason = self._take(sequence, row, decoded)
            if reason is None:
                continue
            if reason == "not finite":
                answers.append(self._fail_not_finite(generation))
                continue
            self._running.remove(sequence)
            self._publish(generation, sequence.tokens[: sequence.num_cached], sequence.pages)
            self._pool.release(sequence.pages)
            sequence.end(reason)
            if generation.is_finished:
                del self._generations[generation.request.request_id]
                answers.append(generation.answer())
        return answers

    def _next_batch(self) -> list[Sequence]:
        """The sequences to decode now: those that waited longest first, all over the same base weights."""
        oldest = min(self._running, key=lambda s: s.last_turn, default=None)
        if oldest is None:
            return []
        base = oldest.generation.weights.base
        return [s for s in self._running if s.generation.weights.base is base]

    def _take(self, sequence: Sequence, row: int, decoded: Any) -> StopReason | Literal["not finite"] | None:
        """Append the row's tokens up to its end; why it ended, if it did."""
        for step in range(int(decoded.steps)):
            token, logprob = int(decoded.tokens[step, row]), float(decoded.logprobs[step, row])
            if not np.isfinite(logprob):
                return "not finite"
            sequence.tokens.append(token)
            sequence.logprobs.append(logprob)
            if sequence.generation.request.topk_sample_logprobs > 0:
                sequence.top.append((decoded.top_tokens[step, row], decoded.top_logprobs[step, row]))
            if (reason := sequence.stop.after(token)) is not None:
                return reason
        return None

    def _publish(self, generation: Generation, tokens: Any, pages: list[int]) -> None:
        self._pool.publish(generation.weights.id, tokens, pages)

    def _fail_not_finite(self, generation: Generation) -> messages.Failed:
        self.cancel(generation.request.request_id)
        return messages.Failed(
            request_id=generation.request.request_id,
            message="the sampler's weights give log-probs that are not finite (NaN or infinite); "
            "sample from an earlier checkpoint, or train with a lower learning rate",
            category="user",
        )

    # --- shapes ------------------------------------------------------------------------------------------

    def _context_pages(self, positions: int) -> int:
        """Table columns for so many cached positions: the bucket's, at most the model's longest."""
        return self._pages_for(min(bucket_of(CONTEXT_BUCKETS, positions), self._longest))

    @contextlib.contextmanager
    def _timed(self, program: str) -> Any:
        if program not in self._compiled:
            log.info("compiling %s", program)  # it may take a while; `on_compile` tells how long it took
        began = time.monotonic()
        yield
        if program not in self._compiled:
            self._compiled.add(program)
            self._on_compile(program, time.monotonic() - began)


def default_kv_cache_tokens(config: ModelConfig, dtype: Any, max_length: int) -> int:
    """A quarter of an accelerator's memory, or 1 GiB on the CPU; at least one sequence of full length up to
    16384 tokens."""
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None
    budget = 2**30 if limit is None else limit // 4
    return max(budget // kv_cache.bytes_per_token(config, dtype), min(max_length, 16384))


def _kind(stack: PyTree | None) -> str:
    """The part of a program's name that tells its adapters' shapes."""
    if stack is None:
        return ""
    n = len(stack["scale"])
    ranks = sorted({leaf["a"].shape[-1] for leaf in stack["layers"].values()})
    names = "+".join([*stack["layers"], *(["unembed"] if "unembed" in stack else [])])
    return f", {n} adapter{'s' if n > 1 else ''} of rank {ranks} on {names}"
