"""The sampler: continuous batching, where many requests share decode steps, joining and leaving between
chunks.

A request is prefilled once, in chunks, whatever its number of samples; its samples then share the full pages
of the prompt and join the running set. `step` runs one unit of work (a prefill chunk or a decode chunk of a
few tokens), so that the engine can look at its socket and train in between. When memory is short the newest
request loses its pages and is prefilled again later. Its random draws depend only on its seed and the token's
position, so it continues as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...ckpt.token_bytes import TokenBytes
from ...ckpt.tokenizer_files import TokenizerError
from ...model import kv_cache
from ...model.config import ModelConfig
from ...model.cpu.weights import base_by_layer
from ...model.kernels.backends import Backend, current_backend
from ...model.sharding import replicated
from .. import messages, processor
from ..budget import Budget
from ..errors import UserError, is_out_of_memory
from ..memory import KV_ON_CPU
from .batch_sizes import batch_sizes
from .page_pool import PagePool
from .prompt_scores import PromptScores
from .sample_checks import check_request
from .sampler_programs import SamplerPrograms
from .sampler_weights import Weights
from .sampling_queue import SamplingQueue
from .sequence import Generation, Prompt, Sequence, seed_of
from .sequence_states import SequenceStates
from .stop import StopRule, implicit_stop_tokens

log = logging.getLogger(__name__)

PyTree = Any

_FIRST_ROWS = 4  # programs of prompts in a row, while the prompts of the first one wait


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
        end_tokens: Iterable[int] | None = None,
        mesh: Any = None,
        kv_cache_tokens: int | None = None,
        state_bytes: int | None = None,
        max_sequence_length: int | None = None,
        max_slots: int | None = None,
        page_size: int = 64,
        prefill_tokens: int | None = None,
        decode_steps: int | None = None,
        backend: Backend | None = None,
        budget: Budget | None = None,
        on_compile: Callable[[str, float], None] | None = None,
    ):
        """`kv_cache_tokens` bounds the memory for keys and values (None: derived from the device), and
        `state_bytes` that for the states of sequences and prefixes, if the model has any.
        `max_sequence_length` is the longest prompt + sample (None: the model's). `max_slots`,
        `prefill_tokens` (a multiple of `page_size`) and `decode_steps` default to what suits the device
        (`batch_sizes`). `end_tokens` end a sample that names no stop (None: those of the config). `backend`
        chooses the kernels (None: that of the mesh's devices). `on_compile(name, seconds)` is called when a
        program ran for the first time.
        """
        self._config = config
        self._token_bytes = token_bytes
        self._end_tokens = tuple(config.eos_token_ids if end_tokens is None else end_tokens)
        self._mesh = mesh
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            backend = backend or current_backend()
        sizes = batch_sizes(backend)
        decode_steps = decode_steps or sizes.steps
        dtype = base["embed_tokens"]["weight"].dtype
        max_length = max_sequence_length or config.max_sequence_length
        tokens = kv_cache_tokens or default_kv_cache_tokens(config, dtype, max_length)
        num_pages = 1 + max(1, tokens // page_size)
        self._pool = PagePool(num_pages, page_size)
        self._longest = min(max_length, self._pool.capacity)
        self._max_length = max_length
        weights_bytes = sum(x.nbytes for x in jax.tree.leaves(base))
        weights_positions = weights_bytes // kv_cache.bytes_per_token(config, dtype)
        slots = max_slots or sizes.slots
        num_states = state_slots(config, state_bytes, slots) if config.has_states else 0
        states = SequenceStates(self._pool, 1 + num_states) if num_states else None
        slots = min(slots, num_states or slots)
        self._queue = SamplingQueue(self._pool, slots, decode_steps, weights_positions, states)
        self._programs = SamplerPrograms(
            graph,
            config,
            dtype=dtype,
            num_pages=num_pages,
            num_slots=1 + num_states,
            page_size=page_size,
            longest=self._longest,
            prefill_tokens=prefill_tokens or sizes.prefill,
            decode_steps=decode_steps,
            mesh=mesh,
            budget=budget or Budget(1 << 28),
            backend=backend,
            on_compile=on_compile,
        )
        self._is_on_cpu = backend == "cpu"
        self._weights: dict[str | None, Weights] = {
            None: Weights(base, base_by_layer(base, config, _is_by_output(base)) if self._is_on_cpu else base)
        }
        self._arrivals = 0
        self._generations: dict[str, Generation] = {}
        self._rows_since_decode = 0
        self._drawn: list[messages.Drawn] = []

    # --- weights -----------------------------------------------------------------------------------------

    def register(
        self,
        key: str,
        adapter: PyTree | None = None,
        *,
        scale: float = 1.0,
        base: PyTree | None = None,
        owned: bool = False,
    ) -> None:
        """Register weights under `key`: an adapter (`model.lora`; scale = alpha / true rank) on the shared
        base, or the full weights `base`.

        The arrays are copied, so that later training does not change them, unless they are `owned` by the
        caller and never change. Registering a known key raises ValueError.
        """
        self._require_new(key)
        copy = functools.partial(jax.tree.map, functools.partial(jnp.array, copy=True))
        if base is not None:
            own = base if owned else copy(base)
            self._weights[key] = Weights(own, base_by_layer(own, self._config) if self._is_on_cpu else own)
            return
        shared = self._weights[None]
        adapter = adapter if owned else copy(adapter)
        if self._mesh is not None:
            adapter = jax.device_put(adapter, replicated(self._mesh))
        self._weights[key] = Weights(shared.base, shared.base_by_layer, adapter, scale)

    def share(self, key: str, weights: Weights) -> None:
        """Register weights that are registered already under `key` too, without copying their arrays."""
        self._require_new(key)
        self._weights[key] = Weights(weights.base, weights.base_by_layer, weights.adapter, weights.scale)

    def _require_new(self, key: str) -> None:
        if key in self._weights:
            raise ValueError(f"sampler weights {key!r} are already registered")

    def release(self, key: str) -> None:
        """Forget the weights of `key`, if it is known. Requests already added still finish."""
        if (weights := self._weights.pop(key, None)) is not None:
            self._programs.stacks.forget(weights)

    def weights_of(self, key: str) -> Weights:
        """Return the weights registered under `key`."""
        return self._weights[key]

    def __contains__(self, key: str) -> bool:
        """Return whether weights are registered under `key`."""
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
        has_tokenizer = self._token_bytes is not None
        check_request(request, prompt, self._config.vocab_size, longest, has_tokenizer, self._config.routing)
        params = request.params
        if params.stop_strings and self._token_bytes is not None:
            try:
                self._token_bytes.read()
            except TokenizerError as error:
                raise UserError(f"stop: {error}; give stop token ids instead") from None
        # The last token sampled is never fed back, so it needs no page. Behind a prompt that fills the
        # context one token is drawn, for requests that only want the prompt's log-probs.
        room = max(1, min(self._max_length, longest + 1) - len(prompt))
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        named = implicit_stop_tokens(params.stop_tokens, params.stop_strings, self._end_tokens)
        # Ids outside the vocabulary are never drawn, so they stop nothing.
        stop_tokens = [token for token in named if 0 <= token < self._config.vocab_size]
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
        self._queue.add(Prompt(generation, deque(sequences), prompt))

    def cancel(self, request_id: str) -> bool:
        """Drop a request and free its slots and memory at once; return False if it is not here."""
        generation = self._generations.pop(request_id, None)
        if generation is None:
            return False
        self._queue.drop(generation)
        return True

    @property
    def used_pages(self) -> int:
        return self._pool.num_pages - 1 - self._pool.num_free  # page 0 belongs to no sequence

    @property
    def free_pages(self) -> int:
        return self._pool.num_free

    def take_slot_counts(self) -> tuple[int, int]:
        """Return how many slots of decode batches were used and how many were empty since the last call."""
        return self._programs.take_slot_counts()

    @property
    def has_work(self) -> bool:
        return bool(self._generations)

    def step(
        self, note: Callable[[Iterable[messages.Sample]], None] = lambda requests: None
    ) -> list[messages.Done | messages.Failed]:
        """Run one unit of work and return the answers of the requests that it finished, in no special order.

        `note` is called first with the requests that it computes. Prefill and decode chunks take turns if
        there are both (`_is_turn_of_prefill`). A request whose weights give non-finite log-probs is answered
        with Failed (category user); any other exception is a fault of ours and leaves the sampler unusable.
        """
        if not self.has_work:
            return []
        with self._programs.ready():
            self._programs.copy(self._queue.admit())
            self._programs.copy(self._queue.start_sequences())
            if self._queue.prefilling and self._is_turn_of_prefill():
                self._rows_since_decode += 1
                pieces = self._queue.next_pieces(self._programs.prefill_lengths)
                note(prompt.generation.request for prompt, _ in pieces)
                return self._prefill(pieces)
            self._rows_since_decode = 0
            running = dict.fromkeys(sequence.generation for sequence in self._queue.running)
            note(generation.request for generation in running)
            return self._decode()

    def _is_turn_of_prefill(self) -> bool:
        """Return whether to prefill next: one program of prompts between two decode chunks.

        Before the first chunk of all running sequences there are a few more: what arrived together then
        decodes together, and a chunk of few sequences costs as much as one of many.
        """
        running = self._queue.running
        if not running:
            return True
        has_room = self._queue.wanted_slots > len(running)
        all_new = all(sequence.is_new for sequence in running)
        return self._rows_since_decode < (_FIRST_ROWS if all_new and has_room else 1)

    def drawn(self) -> list[messages.Drawn]:
        """Return what was drawn since the last call, for requests that stream."""
        drawn, self._drawn = self._drawn, []
        return drawn

    def _prefill(self, pieces: list[tuple[Prompt, int]]) -> list[messages.Done | messages.Failed]:
        """Prefill rows of prompt tokens, as many as a program takes."""
        began = time.monotonic()
        try:
            finite = self._programs.prefill(pieces)
        except jax.errors.JaxRuntimeError as error:
            self._start_over(error, self._programs.shorten_prefill())
            return []
        seconds = (time.monotonic() - began) / len(pieces)
        for prompt, count in pieces:
            prompt.generation.device_seconds += seconds
            self._queue.prefilled(prompt, count)
        broken = {p.generation for (p, _), is_finite in zip(pieces, finite, strict=True) if not is_finite}
        return [self._fail_not_finite(generation) for generation in broken]

    def _decode(self) -> list[messages.Done | messages.Failed]:
        """Decode a few tokens of running sequences that share base weights."""
        began = time.monotonic()
        chosen = self._queue.next_batch()
        if not chosen:
            return []
        positions = max(self._queue.positions_after_chunk(sequence) for sequence in chosen)
        try:
            decoded = self._programs.decode(chosen, positions, self._queue.wanted_slots)
        except jax.errors.JaxRuntimeError as error:
            fewer = self._programs.fewer_slots(len(chosen))
            self._start_over(error, fewer is not None)
            self._queue.max_slots = fewer or 1
            return []
        seconds = (time.monotonic() - began) / len(chosen)
        answers: list[messages.Done | messages.Failed] = []
        for row, sequence in enumerate(chosen):
            generation = sequence.generation
            generation.device_seconds += seconds
            if generation.request.request_id not in self._generations:
                continue  # another sample of the request has just failed
            reason = sequence.take(row, decoded)
            if generation.request.stream and reason != "not finite":
                self._drawn.append(sequence.drawn())
            if reason is None:
                continue
            if reason == "not finite":
                answers.append(self._fail_not_finite(generation))
                continue
            if generation.request.record_routing:
                sequence.experts = self._programs.experts_of(sequence)
            self._queue.finish(sequence)
            sequence.end(reason)
            if generation.is_finished:
                del self._generations[generation.request.request_id]
                answers.append(generation.answer())
        return answers

    def _start_over(self, error: Exception, is_smaller: bool) -> None:
        """After the device ran out of memory, compute the contents of the pages again, in smaller batches.

        Raises `error` if it is another one, or if batches cannot be smaller (`is_smaller` is False).
        """
        if not is_out_of_memory(error) or not is_smaller:
            raise error
        log.warning("the device is out of memory for samples: going on in smaller batches")
        self._programs.drop_pages()
        self._queue.start_over()

    def _fail_not_finite(self, generation: Generation) -> messages.Failed:
        self.cancel(generation.request.request_id)
        return messages.Failed(
            request_id=generation.request.request_id,
            message="the sampler's weights give log-probs that are not finite (NaN or infinite); "
            "sample from an earlier checkpoint, or train with a lower learning rate",
            category="user",
        )


def default_kv_cache_tokens(config: ModelConfig, dtype: Any, max_length: int) -> int:
    """Return how many tokens 1 GiB holds; at least one sequence of full length up to 16384 tokens."""
    return max(KV_ON_CPU // kv_cache.bytes_per_token(config, dtype), min(max_length, 16384))


def state_slots(config: ModelConfig, state_bytes: int | None, slots: int) -> int:
    """Return how many states to keep: what the bytes hold, but no more than four for each slot, and one at
    least. Prefixes have those that no sequence needs."""
    held = (KV_ON_CPU // 2 if state_bytes is None else state_bytes) // kv_cache.bytes_per_sequence(config)
    return max(1, min(held, 4 * slots))


def _is_by_output(base: PyTree) -> bool:
    """Return whether a CPU decodes with copies of the matrices in [out, in] order.

    It does in bfloat16, if they take at most a quarter of the memory: XLA's products of a few rows would
    convert other bfloat16 weights to float32 each time, with and without bfloat16 instructions.
    """
    is_bfloat16 = base["embed_tokens"]["weight"].dtype == jnp.bfloat16
    return is_bfloat16 and sum(x.nbytes for x in jax.tree.leaves(base)) <= processor.memory_bytes() // 4
