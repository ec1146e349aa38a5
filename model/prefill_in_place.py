"""Prefill on accelerators: keys and values are written to the pages, and contexts are read there, in place.

Axis letters: S rows, T tokens of a row, D hidden, K kv heads, H head dim, W tokens written at once.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from . import kv_cache
from .config import Recurrent
from .decoder import Block, Decoder, scan_layers
from .kernels.attention import attention, attention_to_merge
from .kernels.paged_attention import context_attention, merge, with_sinks
from .kernels.paged_attention.pages import Pages
from .kv_cache import Cache
from .lora import LayerLora, LoraStack
from .prefill_rows import EXPERTS, PrefillRows, WithState, by_token, is_expanded, with_states


def run_layers(
    model: Decoder, cache: Cache, lora: LoraStack | None, rows: PrefillRows
) -> tuple[Cache, Float[Array, "S T D"]]:
    """Run the layers. Each writes its keys and values to the pages, and reads its context there."""
    rotations = model.rotations(rows.position)
    page_W, offset_W = rows.page.reshape(-1), rows.offset.reshape(-1)

    def run(block: Block, carried: Any, pairs: dict, number: Array) -> tuple[tuple[Array, Cache], dict]:
        x_STD, cache = carried
        mixer = block.layer.mixer
        routes: list[Array] = []
        block_lora = None if lora is None else LayerLora(pairs, lora["scale"], None)
        if mixer is None:
            x_STD = block(x_STD, rotations, None, block_lora, routes=routes)
            return (x_STD, cache), by_token(routes)
        if isinstance(mixer, Recurrent):
            mix = WithState(mixer, cache, number, rows)
            x_STD = block(x_STD, rotations, mix, block_lora, routes=routes)
            return (x_STD, cache), mix.kept | by_token(routes)
        pages = cache.pages(mixer.cached)
        expanded, latents = is_expanded(mixer, rows), []

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
        return (x_STD, cache.updated(mixer.cached, pages)), by_token(routes)

    x_STD = model.embed_tokens(rows.tokens)
    (x_STD, cache), kept = scan_layers(model, lora, (x_STD, cache), run, numbers=model.config.cache_numbers)
    cache = kv_cache.with_experts(cache, kept.get(EXPERTS), page_W, offset_W)
    return with_states(cache, rows, kept), x_STD
