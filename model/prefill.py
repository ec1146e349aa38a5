"""The sampler's two programs for prompts: `prefill` runs rows of them, `score` scores their tokens.

They run the same blocks as the trainer (`decoder.Block`), with a `mix` that reads the cache, so that sampler
and trainer compute the same log-probs. Shapes depend only on the buckets of rows, tokens
per row and context pages; everything else is traced.

Axis letters: S rows, T tokens of a row, D hidden, V vocabulary, L layers, K kv heads, H head dim, P pages of
a table, C context positions, W tokens scored and A tokens drawn per position.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from . import kv_cache, token_sampling
from .config import Attention, KeysValues, Latent, Recurrent, States
from .decoder import Base, Block, Decoder, logits, scan_layers, unembed
from .kernels.attention import attention, attention_to_merge
from .kernels.paged_attention import context_attention, merge, with_sinks
from .kernels.paged_attention.cpu import attend_parts, read_layer
from .kernels.paged_attention.pages import Pages
from .kv_cache import Cache
from .lora import LayerLora, LoraStack
from .recurrent import mix_on
from .states import State

_EXPERTS = -1  # among what layers keep, by the numbers of kinds


class PrefillRows(NamedTuple):
    """Rows of prompt tokens. A row holds several whole prompts, or one that continues the pages of its
    `table`.

    `start` is the first token of the row that belongs to the same prompt. `page` and `offset` are the place
    for each token's key and value (page 0 for padding). The first `context` positions of a row's `table` are
    the cached beginning of its prompt; the tables of whole prompts have no pages.

    If the model keeps states of sequences, each row has one prompt, and `slot` is that of its state.
    """

    tokens: Int[Array, "S T"]
    position: Int[Array, "S T"]
    start: Int[Array, "S T"]
    page: Int[Array, "S T"]
    offset: Int[Array, "S T"]
    table: Int[Array, "S P"]
    context: Int[Array, " S"]
    slot: Int[Array, " S"] | None = None


@partial(jax.jit, static_argnames="graph", donate_argnames="cache")
def prefill(
    graph: nnx.GraphDef, base: Base, cache: Cache, lora: LoraStack | None, rows: PrefillRows
) -> tuple[Cache, Float[Array, "ST D"]]:
    """Run prompt tokens through the trunk and store their keys and values in the cache.

    Returns the final hidden states, row after row. `lora` holds one adapter."""
    model = nnx.merge(graph, base)
    run = _with_contexts_read if cache.backend == "cpu" else _in_place
    cache, x_STD = run(model, cache, lora, rows)
    return cache, model.norm(x_STD).reshape(-1, model.config.hidden_size)


def _with_contexts_read(
    model: Decoder, cache: Cache, lora: LoraStack | None, rows: PrefillRows
) -> tuple[Cache, Float[Array, "S T D"]]:
    """Run the layers on a CPU: each reads its context from the pages, and all keys and values are written
    together at the end."""
    visible = _visible_in_prompt(rows, cache.page_size)
    rotations = model.rotations(rows.position)

    def run(block: Block, x_BTD: Array, pairs: dict, number: Array) -> tuple[Array, dict[int, Any]]:
        mixer = block.layer.mixer
        routes: list[Array] = []
        block_lora = None if lora is None else LayerLora(pairs, lora["scale"], None)
        if mixer is None:
            return block(x_BTD, rotations, None, block_lora, routes=routes), _by_token(routes)
        if isinstance(mixer, Recurrent):
            mix = _WithState(mixer, cache, number, rows)
            x_BTD = block(x_BTD, rotations, mix, block_lora, routes=routes)
            return x_BTD, mix.kept | _by_token(routes)
        kept: list[Array] = []
        expanded = _is_expanded(mixer, rows)

        def attend(q: Array, k: Array, v: Array, sinks: Array | None = None) -> Array:
            if not expanded:
                kept.extend((k, v)[: len(mixer.cached.stored_dims)])
            if not rows.table.shape[1]:
                return attention(q, k, v, rows.start, mixer.scale, window=mixer.window, sinks_N=sinks)
            context_visible, own_visible = visible(mixer.window)
            context = read_layer(cache.pages(mixer.cached), number, rows.table, q.dtype)
            own = (k.transpose(0, 2, 3, 1), v.swapaxes(1, 2), own_visible)
            parts = [(*context, context_visible), own]
            return attend_parts(q, parts, mixer.scale, sinks)

        x_BTD = block(x_BTD, rotations, attend, block_lora, routes=routes, cached=not expanded, latents=kept)
        return x_BTD, {cache.kinds.index(mixer.cached): tuple(kept)} | _by_token(routes)

    x_STD, kept = scan_layers(
        model, lora, model.embed_tokens(rows.tokens), run, numbers=model.config.cache_numbers
    )
    page, offset = rows.page.reshape(-1), rows.offset.reshape(-1)
    for at, kind in enumerate(cache.kinds):
        if isinstance(kind, KeysValues):
            new = [x.reshape(len(x), -1, *x.shape[3:]).swapaxes(0, 1) for x in kept[at]]
            cache = cache.updated(kind, kv_cache.write(cache.pages(kind), new, page, offset))
    cache = kv_cache.with_experts(cache, kept.get(_EXPERTS), page, offset)
    return _with_states(cache, rows, kept), x_STD


class _WithState:
    """Mixes rows of prompts in a layer with states. `kept` is each row's state at the end of its tokens."""

    def __init__(self, mixer: Recurrent, cache: Cache, number: Array, rows: PrefillRows):
        self._mixer, self._cache, self._number, self._rows = mixer, cache, number, rows
        self.kept: dict[int, State] = {}

    def __call__(self, tokens: Any, weights: Any) -> Array:
        rows, cache, kind = self._rows, self._cache, self._mixer.cached
        assert rows.slot is not None
        before = cache.states(kind).read(self._number, rows.slot, rows.context == 0)
        out, after = mix_on(self._mixer, tokens, weights, before, rows.start == 0)
        self.kept[cache.kinds.index(kind)] = after
        return out


def _with_states(cache: Cache, rows: PrefillRows, kept: dict[int, Any]) -> Cache:
    """Write the states of all layers, [L S ...] by kind, to the rows' slots."""
    for at, kind in enumerate(cache.kinds):
        if isinstance(kind, States):
            slots = cache.states(kind).written(slice(None), rows.slot, kept[at])
            cache = cache.updated(kind, slots)
    return cache


def _in_place(
    model: Decoder, cache: Cache, lora: LoraStack | None, rows: PrefillRows
) -> tuple[Cache, Float[Array, "S T D"]]:
    """Run the layers on an accelerator: each writes its keys and values to the pages, and reads its context
    there in place."""
    rotations = model.rotations(rows.position)
    page_W, offset_W = rows.page.reshape(-1), rows.offset.reshape(-1)

    def run(block: Block, carried: Any, pairs: dict, number: Array) -> tuple[tuple[Array, Cache], dict]:
        x_STD, cache = carried
        mixer = block.layer.mixer
        routes: list[Array] = []
        block_lora = None if lora is None else LayerLora(pairs, lora["scale"], None)
        if mixer is None:
            x_STD = block(x_STD, rotations, None, block_lora, routes=routes)
            return (x_STD, cache), _by_token(routes)
        if isinstance(mixer, Recurrent):
            mix = _WithState(mixer, cache, number, rows)
            x_STD = block(x_STD, rotations, mix, block_lora, routes=routes)
            return (x_STD, cache), mix.kept | _by_token(routes)
        pages = cache.pages(mixer.cached)
        expanded, latents = _is_expanded(mixer, rows), []

        def written(k: Array, v: Array) -> Pages:
            k_WKH, v_WKH = (x.reshape(-1, *x.shape[2:]) for x in (k, v))
            return kv_cache.write_layer(pages, number, k_WKH, v_WKH, page_W, offset_W)

        def attend(q: Array, k: Array, v: Array, sinks: Array | None = None) -> Array:
            nonlocal pages
            if not expanded:
                pages = written(k, v)
            if not rows.table.shape[1]:
                return attention(q, k, v, rows.start, mixer.scale, window=mixer.window, sinks_N=sinks)
            own = with_sinks(attention_to_merge(q, k, v, rows.start, mixer.scale, window=mixer.window), sinks)
            first = jnp.zeros_like(rows.position)
            if mixer.window is not None:
                first = jnp.maximum(rows.position - mixer.window + 1, 0)
            context = context_attention(q, pages, number, rows.table, first, rows.context, mixer.scale)
            return merge(own, context).astype(q.dtype)

        x_STD = block(
            x_STD, rotations, attend, block_lora, routes=routes, cached=not expanded, latents=latents
        )
        if expanded:
            pages = written(latents[0], latents[0])
        return (x_STD, cache.updated(mixer.cached, pages)), _by_token(routes)

    x_STD = model.embed_tokens(rows.tokens)
    (x_STD, cache), kept = scan_layers(model, lora, (x_STD, cache), run, numbers=model.config.cache_numbers)
    cache = kv_cache.with_experts(cache, kept.get(_EXPERTS), page_W, offset_W)
    return _with_states(cache, rows, kept), x_STD


def _is_expanded(mixer: Attention | Latent, rows: PrefillRows) -> bool:
    """Return whether latent attention expands the keys and values of these rows.

    It takes fewer operations where no stored position is read: keys and values have fewer numbers expanded
    than latents have, and the matrix is multiplied with as many vectors either way."""
    return isinstance(mixer, Latent) and not rows.table.shape[1]


def _by_token(routes: list[Array]) -> dict[Any, Array]:
    """Return what a layer keeps of the experts that it has chosen, [S T k], if any."""
    return {} if not routes else {_EXPERTS: routes[0].reshape(-1, routes[0].shape[-1])}


def _visible_in_prompt(
    rows: PrefillRows, page_size: int
) -> Callable[[int | None], tuple[Bool[Array, "S T C"], Bool[Array, "S T T"]]]:
    """Return a function that says which cached positions, and which of its row, each token of a row sees.

    Its argument is the sliding window of a layer."""
    context, own = jnp.arange(rows.table.shape[1] * page_size), jnp.arange(rows.tokens.shape[1])

    def visible(window: int | None) -> tuple[Bool[Array, "S T C"], Bool[Array, "S T T"]]:
        first = jnp.zeros_like(rows.position)
        if window is not None:
            first = rows.position - window + 1
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
