"""The sampler's two programs for prompts: `prefill` runs rows of them, `score` scores their tokens.

They run the same blocks as the trainer (`decoder.Block`), with an `attend` that reads pages of keys and
values, so that sampler and trainer compute the same log-probs. Shapes depend only on the buckets of rows,
tokens per row and context pages; everything else is traced.

Axis letters: S rows, T tokens of a row, D hidden, V vocabulary, L layers, K kv heads, H head dim, P pages of
a table, C context positions, W tokens scored and A tokens drawn per position.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from . import kv_cache, token_sampling
from .attention import attend_parts
from .config import ModelConfig
from .decoder import Base, logits, unembed, windowed_by_layer
from .kernels.attention import attention
from .kv_cache import Pages
from .lora import LayerLora, LoraStack


class PrefillRows(NamedTuple):
    """Rows of prompt tokens. A row holds several whole prompts, or one that continues the pages of its
    `table`.

    `start` is the first token of the row that belongs to the same prompt. `page` and `offset` are the place
    for each token's key and value (page 0 for padding). The first `context` positions of a row's `table` are
    the cached beginning of its prompt; the tables of whole prompts have no pages.
    """

    tokens: Int[Array, "S T"]
    position: Int[Array, "S T"]
    start: Int[Array, "S T"]
    page: Int[Array, "S T"]
    offset: Int[Array, "S T"]
    table: Int[Array, "S P"]
    context: Int[Array, " S"]


@partial(jax.jit, static_argnames="graph", donate_argnames="pages")
def prefill(
    graph: nnx.GraphDef, base: Base, pages: Pages, lora: LoraStack | None, rows: PrefillRows
) -> tuple[Pages, Float[Array, "ST D"]]:
    """Run prompt tokens through the trunk and store their keys and values in the pages.

    Returns the final hidden states, row after row. `lora` holds one adapter."""
    model = nnx.merge(graph, base)
    config = model.config
    visible = _visible_in_prompt(config, rows, pages.page_size)
    at, scale = model.rotation(rows.position), config.head_dim**-0.5
    block_graph, stacked = nnx.split(model.layers)

    def step(x_BTD: Array, layer: tuple) -> tuple[Array, tuple]:
        weights, pairs, windowed, index = layer
        kept = []

        def attend(q: Array, k: Array, v: Array) -> Array:
            kept.extend((k, v))
            if not rows.table.shape[1]:
                return attention(q, k, v, rows.start, scale, window=config.sliding_window, windowed=windowed)
            context_visible, own_visible = visible(windowed)
            context = kv_cache.read_layer(pages, index, rows.table, q.dtype)
            own = (k.transpose(0, 2, 3, 1), v.swapaxes(1, 2), own_visible)
            parts = [(*context, context_visible), own]
            return attend_parts(q, parts, scale)

        block_lora = None if lora is None else LayerLora(pairs, lora["scale"], None)
        x_BTD = nnx.merge(block_graph, weights)(x_BTD, at, attend, block_lora)
        return x_BTD, tuple(kept)

    x_BTD = model.embed_tokens(rows.tokens)
    pairs = {} if lora is None else lora["layers"]
    layers = (stacked, pairs, windowed_by_layer(config), jnp.arange(config.num_layers))
    x_BTD, kept = jax.lax.scan(step, x_BTD, layers)
    k_WLKH, v_WLKH = (x.reshape(len(x), -1, *x.shape[3:]).swapaxes(0, 1) for x in kept)
    pages = kv_cache.write(pages, k_WLKH, v_WLKH, rows.page.reshape(-1), rows.offset.reshape(-1))
    return pages, model.norm(x_BTD).reshape(-1, config.hidden_size)


def _visible_in_prompt(
    config: ModelConfig, rows: PrefillRows, page_size: int
) -> Callable[[Bool[Array, ""] | None], tuple[Bool[Array, "S T C"], Bool[Array, "S T T"]]]:
    """Return a function that says which cached positions, and which of its row, each token of a row sees.

    Its argument is a layer's entry in `windowed_by_layer`."""
    context, own = jnp.arange(rows.table.shape[1] * page_size), jnp.arange(rows.tokens.shape[1])
    window = config.sliding_window

    def visible(windowed: Bool[Array, ""] | None) -> tuple[Bool[Array, "S T C"], Bool[Array, "S T T"]]:
        first = jnp.zeros_like(rows.position)
        if window is not None:
            narrowed = rows.position - window + 1
            first = narrowed if windowed is None else jnp.where(windowed, narrowed, first)
        first, start = first[..., None], rows.start[..., None]
        context_visible = (context < rows.context[:, None, None]) & (context >= first)
        own_visible = (own <= own[:, None]) & (rows.position[:, None] >= first) & (own >= start)
        return context_visible, own_visible

    return visible


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
