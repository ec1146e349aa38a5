"""Decoding on accelerators: pages are read and written in place, and the layers are scanned.

Each token's keys and values go into the pages before the layer's attention reads them. Neither contexts nor
weights are copied, the number of tokens is fixed, and no branch depends on computed values: nothing in the
loop over tokens waits for the host.

Under a mesh the weights stay where they are. The residual stream is cut along its hidden axis like the rows
of the matrices (`embed`), so that products over it are summed between devices: a few kilobytes per sequence
instead of the weights. The cached heads are cut over `tensor` and `fsdp`.

Axis letters: S sequences, D hidden, V vocabulary, K kv heads, H head dim, M tokens decoded by one call.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Int

from . import kv_cache
from .config import Recurrent
from .decode_rows import DecodeRows
from .decoder import Base, Block, scan_layers, unembed
from .kernels.paged_attention import decode_attention
from .kv_cache import Cache
from .lora import LayerLora, LoraStack
from .recurrent import mix_one
from .sharding import LogicalAxes, constrain
from .states import where_alive

_RESIDUAL: LogicalAxes = ("sequences", "tokens", "embed")
_HEADS: LogicalAxes = ("sequences", "cached_heads", "head_dim")


def _kept(routes: list[Array]) -> dict[str, Array]:
    """Return what a layer keeps of the experts that it has chosen, [S 1 k], if any."""
    return {} if not routes else {"experts": routes[0][:, 0]}


class Scanned:
    """See `decode.Steps`. The state is the cache."""

    fixed = each_once = True

    def __init__(
        self, graph: nnx.GraphDef, base: Base, cache: Cache, lora: LoraStack | None, rows: DecodeRows
    ):
        self.model = nnx.merge(graph, base)
        self.head_VD = unembed(base)
        self._table_VD = base["embed_tokens"]["weight"]
        self._cache, self._lora, self._rows = cache, lora, rows

    def first_state(self) -> Cache:
        return self._cache

    def run(
        self, step: Int[Array, ""], token_S: Int[Array, " S"], alive_S: Bool[Array, " S"], state: Cache
    ) -> tuple[Array, Cache]:
        rows, lora = self._rows, self._lora
        position_S = rows.position + step
        page_S, offset_S = self._places(position_S)
        rotations = self.model.rotations(position_S[:, None])

        def layer(block: Block, carried: Any, pairs: dict, number: Array) -> tuple[tuple[Array, Cache], dict]:
            x_S1D, cache = carried
            mixer = block.layer.mixer
            routes: list[Array] = []
            block_lora = None
            if lora is not None:
                block_lora = LayerLora(pairs, lora["scale"], rows.adapter, each_once=True)
            if mixer is None:
                x_S1D = block(x_S1D, rotations, None, block_lora, residual=_RESIDUAL, routes=routes)
                return (x_S1D, cache), _kept(routes)
            if isinstance(mixer, Recurrent):
                slots = cache.states(mixer.cached)

                def on(tokens: Any, weights: Any) -> Array:
                    nonlocal slots
                    before = slots.read(number, rows.slot, position_S == 0)
                    out, after = mix_one(mixer, tokens, weights, before)
                    slots = slots.written(number, rows.slot, where_alive(alive_S, after, before))
                    return out

                x_S1D = block(x_S1D, rotations, on, block_lora, residual=_RESIDUAL, routes=routes)
                return (x_S1D, cache.updated(mixer.cached, slots)), _kept(routes)
            pages = cache.pages(mixer.cached)

            def attend(q_S1NH: Array, k_S1KH: Array, v_S1KH: Array, *sinks: Array) -> Array:
                nonlocal pages
                k_SKH, v_SKH = (constrain(x[:, 0], _HEADS) for x in (k_S1KH, v_S1KH))
                pages = kv_cache.write_layer(pages, number, k_SKH, v_SKH, page_S, offset_S)
                first_S = None if mixer.window is None else jnp.maximum(position_S - mixer.window + 1, 0)
                length_S = position_S + 1
                out_SNH = decode_attention(
                    q_S1NH[:, 0], pages, number, rows.table, first_S, length_S, mixer.scale, *sinks
                )
                return out_SNH[:, None]

            x_S1D = block(
                x_S1D, rotations, attend, block_lora, residual=_RESIDUAL, routes=routes, cached=True
            )
            return (x_S1D, cache.updated(mixer.cached, pages)), _kept(routes)

        x_S1D = constrain(constrain(self._table_VD, ("vocab", "embed"))[token_S[:, None]], _RESIDUAL)
        x_S1D = self.model.embed_tokens.scaled(x_S1D)
        (x_S1D, cache), kept = scan_layers(
            self.model, lora, (x_S1D, state), layer, numbers=self.model.config.cache_numbers
        )
        cache = kv_cache.with_experts(cache, kept.get("experts"), page_S, offset_S)
        return self.model.norm(x_S1D), cache

    def cache(self, state: Cache) -> Cache:
        return state

    def _places(self, position_S: Int[Array, " S"]) -> tuple[Int[Array, " S"], Int[Array, " S"]]:
        """Return the page and offset of each row's token; page 0 for positions beyond its table."""
        table_SP, Z = self._rows.table, self._cache.page_size
        column_S = position_S // Z
        page_S = jnp.take_along_axis(table_SP, jnp.minimum(column_S, table_SP.shape[1] - 1)[:, None], axis=1)[
            :, 0
        ]
        return jnp.where(column_S < table_SP.shape[1], page_S, 0), position_S % Z
