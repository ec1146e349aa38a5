"""Prefill on a CPU: each layer lays its context end to end, and the pages are written once, after all layers.

Axis letters: S rows, T tokens of a row, D hidden, C context positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .. import kv_cache
from ..config import KeysValues, Recurrent
from ..decoder import Block, Decoder, scan_layers
from ..kernels.attention import attention
from ..kernels.paged_attention.cpu import attend_parts, read_layer
from ..kernels.two_byte_floats import restored, stored
from ..kv_cache import Cache
from ..lora import LayerLora, LoraStack
from ..prefill_rows import EXPERTS, PrefillRows, WithState, by_token, is_expanded, with_states


def run_layers(
    model: Decoder, cache: Cache, lora: LoraStack | None, rows: PrefillRows
) -> tuple[Cache, Float[Array, "S T D"]]:
    """Run the layers. Each reads its context from the pages; all keys and values are written together at the
    end."""
    visible = _visible_in_prompt(rows, cache.page_size)
    rotations = model.rotations(rows.position)

    def run(block: Block, x_BTD: Array, pairs: dict, number: Array) -> tuple[Array, dict[int, Any]]:
        mixer = block.layer.mixer
        routes: list[Array] = []
        block_lora = None if lora is None else LayerLora(pairs, lora["scale"], None)
        if mixer is None:
            return block(x_BTD, rotations, None, block_lora, routes=routes), by_token(routes)
        if isinstance(mixer, Recurrent):
            mix = WithState(mixer, cache, number, rows)
            x_BTD = block(x_BTD, rotations, mix, block_lora, routes=routes)
            return x_BTD, mix.kept | by_token(routes)
        kept: list[Array] = []
        expanded = is_expanded(mixer, rows)

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
        # As integers: to write a layer's bfloat16 values, XLA would convert those of all layers.
        return x_BTD, {cache.kinds.index(mixer.cached): tuple(map(stored, kept))} | by_token(routes)

    x_STD, kept = scan_layers(
        model, lora, model.embed_tokens(rows.tokens), run, numbers=model.config.cache_numbers
    )
    page, offset = rows.page.reshape(-1), rows.offset.reshape(-1)
    for at, kind in enumerate(cache.kinds):
        if isinstance(kind, KeysValues):
            of_layers = [restored(x, x_STD.dtype) for x in kept[at]]
            new = [x.reshape(len(x), -1, *x.shape[3:]).swapaxes(0, 1) for x in of_layers]
            cache = cache.updated(kind, kv_cache.write(cache.pages(kind), new, page, offset))
    cache = kv_cache.with_experts(cache, kept.get(EXPERTS), page, offset)
    return with_states(cache, rows, kept), x_STD


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
