"""The sampler's decode program, which draws a few tokens per call. Its programs for prompts are in `prefill`.

It runs the same blocks as the trainer (`decoder.Block`), with a `mix` that reads the cache, so that sampler
and trainer compute the same log-probs. Shapes depend only on the buckets of sequences and
context pages; everything else is traced. How the layers are run for one token depends on the backend of
the cache: `cpu.decode` is for CPUs, `decode_scanned` for accelerators.

Axis letters: S sequences, D hidden, V vocabulary, M tokens decoded by one call.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from . import penalties, token_sampling
from .cpu.decode import Unrolled
from .cpu.weights import BaseByLayer
from .decode_rows import DecodeRows
from .decode_scanned import Scanned
from .decoder import Base, Decoder, logits
from .kv_cache import Cache
from .lora import LoraStack
from .token_sampling import Drawing


class Decoded(NamedTuple):
    """The tokens drawn.

    `steps` of them are valid per row; entries beyond, or after a row's end, are undefined."""

    steps: Int[Array, ""]
    tokens: Int[Array, "M S"]
    logprobs: Float[Array, "M S"]
    top_tokens: Int[Array, "M S top"]
    top_logprobs: Float[Array, "M S top"]


class Steps(Protocol):
    """Runs the layers for one token of every row; `state` is what it carries from token to token."""

    model: Decoder
    head_VD: Float[Array, "V D"]
    fixed: bool
    """Whether M tokens are always computed, even if all rows end earlier.

    The loop over tokens then has no condition on computed values: a GPU would wait for it at each token."""

    each_once: bool
    """How the head's adapters are applied (`lora.delta`)."""

    def first_state(self) -> Any: ...

    def run(
        self, step: Int[Array, ""], token_S: Int[Array, " S"], alive_S: Bool[Array, " S"], state: Any
    ) -> tuple[Float[Array, "S 1 D"], Any]:
        """Return the hidden states of the rows' tokens, at position + step, after the final norm.

        The states of rows that are not `alive` stay as they are."""

    def cache(self, state: Any) -> Cache:
        """Return the cache, with what is kept of this call's tokens."""


@partial(jax.jit, static_argnames=("graph", "drawing"), donate_argnames="cache")
def decode(
    graph: nnx.GraphDef,
    base: Base | BaseByLayer,
    cache: Cache,
    lora: LoraStack | None,
    rows: DecodeRows,
    want_top: Bool[Array, ""],
    drawing: Drawing = Drawing.AT_RUN_TIME,
) -> tuple[Cache, Decoded]:
    """Draw up to M tokens for every row, or fewer if all rows end earlier.

    A row ends when its budget is spent or one of its `stop_tokens` is drawn (-1 is no token). The backend is
    that of `cache`. `base` and `lora` may come from `cpu.weights`. `drawing` is what is known of all
    rows when the program is compiled.
    """
    steps: Steps
    if isinstance(base, BaseByLayer) or cache.backend == "cpu":
        steps = Unrolled(graph, base, cache, lora, rows)
    else:
        steps = Scanned(graph, base, cache, lora, rows)
    S, V = rows.last_token.shape[0], steps.model.config.vocab_size
    M, top = rows.u.shape[0], min(token_sampling.TOP_K, V)
    sample = partial(token_sampling.sample_tokens, rows=rows.sampling, want_top=want_top, drawing=drawing)

    def going(state: tuple) -> Array:
        step, alive, *_ = state
        return (step < M) & alive.any()

    def one_token(state: tuple) -> tuple:
        step, alive, token, carried, seen, out = state
        hidden, carried = steps.run(step, token, alive, carried)
        z = logits(steps.head_VD, lora, hidden, rows.adapter, steps.each_once)[:, 0]
        if rows.penalties is not None:
            z = penalties.penalized(z, rows.penalties, seen)
        drawn = sample(z, u=rows.u[step])
        if rows.penalties is not None:
            seen = penalties.after(seen, drawn.tokens)
        out = jax.tree.map(lambda all_, new: all_.at[step].set(new), out, tuple(drawn))
        alive &= (step + 1 < rows.budget) & (drawn.tokens[:, None] != rows.stop_tokens).all(-1)
        return step + 1, alive, drawn.tokens, carried, seen, out

    out = (
        jnp.zeros((M, S), jnp.int32),
        jnp.zeros((M, S), jnp.float32),
        jnp.zeros((M, S, top), jnp.int32),
        jnp.zeros((M, S, top), jnp.float32),
    )
    seen = None if rows.penalties is None else penalties.seen_so_far(rows.penalties, V)
    state = (jnp.int32(0), rows.budget > 0, rows.last_token, steps.first_state(), seen, out)
    if steps.fixed:
        state = jax.lax.fori_loop(0, M, lambda _, state: one_token(state), state)
    else:
        state = jax.lax.while_loop(going, one_token, state)
    done, _, _, carried, _, out = state
    return steps.cache(carried), Decoded(done, *out)
