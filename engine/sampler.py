"""Continuous batching: many requests share decode steps, joining and leaving between short chunks.

A request is first prefilled once, in chunks, whatever its number of samples; its samples then share the
pages of the prompt and join the running set. `step` runs one unit of work (a prefill chunk or a decode chunk
of a few tokens), so that the engine can look at its socket and train in between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..model.config import ModelConfig
from . import messages
from .tokenizer import TokenBytes

PyTree = Any


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
        `max_sequence_length` is the longest prompt + sample (None: the model's). `on_compile(name, seconds)` is
        called after a program was compiled."""
        raise NotImplementedError

    def register(
        self, key: str, adapter: PyTree | None = None, *, scale: float = 1.0, base: PyTree | None = None
    ) -> None:
        """Make weights known under `key`: an adapter (`model.lora`; scale = alpha / true rank) on the shared
        base, or the full weights `base`. The arrays are copied: what training does to its own later has no
        effect. Registering a known key raises ValueError."""
        raise NotImplementedError

    def release(self, key: str) -> None:
        """Forget the weights of `key` (unknown: nothing happens). Requests already added still finish."""
        raise NotImplementedError

    def __contains__(self, key: str) -> bool:
        """Whether weights are registered under `key`."""
        raise NotImplementedError

    def add(self, request: messages.Sample, key: str | None = None) -> None:
        """Queue a request for the weights `key` (None: the base model). `request.sampler` is not read.

        Raises UserError if the request cannot be served (empty or too long a prompt, a token outside the
        vocabulary, bad parameters), KeyError if `key` is not registered."""
        raise NotImplementedError

    def cancel(self, request_id: str) -> bool:
        """Drop a request and free its slots and memory at once; False if it is not here (any more)."""
        raise NotImplementedError

    @property
    def has_work(self) -> bool:
        raise NotImplementedError

    def step(self) -> list[messages.Done | messages.Failed]:
        """Run one unit of work and return the answers of the requests that it finished, in no special order.

        A request whose weights give non-finite log-probs is answered with Failed (category user); any other
        exception is a fault of ours and leaves the sampler unusable."""
        raise NotImplementedError
