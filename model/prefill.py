"""The sampler's two programs for prompts: `prefill` runs rows of them, `score` scores their tokens.

They run the same blocks as the trainer (`decoder.Block`), with a `mix` that reads the cache, so that sampler
and trainer compute the same log-probs. Shapes depend only on the buckets of rows, tokens
per row and context pages; everything else is traced. How the layers are run depends on the backend of the
cache: `cpu.prefill` is for CPUs, `prefill_in_place` for accelerators.

Axis letters: S rows, T tokens of a row, D hidden, V vocabulary, W tokens scored and A tokens drawn per
position.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from . import prefill_in_place, token_sampling
from .cpu import prefill as cpu
from .decoder import Base, logits, unembed
from .kv_cache import Cache
from .lora import LoraStack
from .prefill_rows import PrefillRows


@partial(jax.jit, static_argnames="graph", donate_argnames="cache")
def prefill(
    graph: nnx.GraphDef, base: Base, cache: Cache, lora: LoraStack | None, rows: PrefillRows
) -> tuple[Cache, Float[Array, "ST D"]]:
    """Run prompt tokens through the trunk and store their keys and values in the cache.

    Returns the final hidden states, row after row. `lora` holds one adapter."""
    model = nnx.merge(graph, base)
    layers = cpu if cache.backend == "cpu" else prefill_in_place
    cache, x_STD = layers.run_layers(model, cache, lora, rows)
    return cache, model.norm(x_STD).reshape(-1, model.config.hidden_size)


class PromptScores(NamedTuple):
    """Log-probs at temperature 1: of W given tokens, the most likely ones if requested, and A drawn ones."""

    logprobs: Float[Array, "T W"]
    top_tokens: Int[Array, "T top"]
    top_logprobs: Float[Array, "T top"]
    drawn: Int[Array, "T A"]
    drawn_logprobs: Float[Array, "T A"]


_SCORED_AT_ONCE = 64


@jax.jit
def score(
    base: Base,
    lora: LoraStack | None,
    hidden_TD: Float[Array, "T D"],
    next_TW: Int[Array, "T W"],
    want_top: Bool[Array, ""],
    temperature_T: Float[Array, " T"],
    u_TA2: Float[Array, "T A 2"],
) -> PromptScores:
    """Return log p(next token | tokens so far) from prefill's hidden states, in chunks of a few tokens.

    A next tokens are also drawn per position, with replacement, at `temperature_T` (0: the most likely one),
    from the uniforms `u_TA2`."""
    head_VD = unembed(base)
    T = hidden_TD.shape[0]
    size = min(_SCORED_AT_ONCE, T)

    def some(piece: tuple[Array, ...]) -> PromptScores:
        hidden, next_, temperature, u = piece
        z = logits(head_VD, lora, hidden[None], None)[0]
        log_normalizer = jax.nn.logsumexp(z, axis=-1, keepdims=True)
        top = min(token_sampling.TOP_K, z.shape[-1])
        top_z, top_tokens = jax.lax.cond(
            want_top,
            lambda: tuple(jax.lax.top_k(z, top)),
            lambda: (jnp.zeros((size, top), z.dtype), jnp.zeros((size, top), jnp.int32)),
        )
        chosen = jnp.take_along_axis(z, next_, axis=-1)
        drawn = jnp.zeros(u.shape[:2], jnp.int32)
        if u.shape[1]:
            drawn = token_sampling.draw_many(z, temperature, u)
        return PromptScores(
            chosen - log_normalizer,
            top_tokens.astype(jnp.int32),
            top_z - log_normalizer,
            drawn,
            jnp.take_along_axis(z, drawn, axis=-1) - log_normalizer,
        )

    per_token = (hidden_TD, next_TW, temperature_T, u_TA2)
    pieces = tuple(x.reshape(T // size, size, *x.shape[1:]) for x in per_token)
    return jax.tree.map(lambda x: x.reshape(T, *x.shape[2:]), jax.lax.map(some, pieces))
