"""Decoding on a CPU: the context is read from the pages once per call, and the layers are unrolled.

Keys and values of the new tokens are held beside the context and written to the pages together at the end.

Axis letters: S sequences, D hidden, K kv heads, H head dim, L layers, P pages of a table, C context
positions, M tokens decoded by one call.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from .. import kv_cache
from ..config import KeysValues, Recurrent, States
from ..decode_rows import DecodeRows
from ..decoder import Base
from ..kernels.paged_attention.cpu import attend_parts, read_layer
from ..kv_cache import Cache
from ..lora import LayerLora, LoraStack
from ..recurrent import mix_one
from ..states import where_alive
from .weights import BaseByLayer, open_layers, open_stack


class Unrolled:
    """See `decode.Steps`. The state is each mixer's keys and values of this call's tokens, or its states of
    the rows' sequences, and the experts of these tokens."""

    fixed = each_once = False

    def __init__(
        self,
        graph: nnx.GraphDef,
        base: Base | BaseByLayer,
        cache: Cache,
        lora: LoraStack | None,
        rows: DecodeRows,
    ):
        # Cut into layers outside the loop over tokens; inside, XLA would repeat it for every token.
        self.model, self._blocks, self.head_VD, self._wide = open_layers(graph, base)
        self._cache, self._lora, self._rows = cache, lora, rows
        config = self.model.config
        dtype = self._dtype = self.model.norm.weight.dtype
        numbers = zip((layer.cached for layer in config.layers), config.cache_numbers, strict=True)
        self._contexts = [
            read_layer(cache.pages(kind), number, rows.table, dtype)
            if isinstance(kind, KeysValues)
            else cache.states(kind).read(number, rows.slot, rows.position == 0)
            for kind, number in numbers
            if kind is not None
        ]
        no_pairs: tuple = ({},) * config.num_layers
        self._pairs = open_stack(lora["layers"], config) if lora and lora["layers"] else no_pairs
        # Computed for all tokens before the loop; inside, XLA would recompute the cosines in every block.
        self._rotations = self.model.rotations(rows.position[:, None] + jnp.arange(self._tokens))

    @property
    def _tokens(self) -> int:
        return self._rows.u.shape[0]

    def first_state(self) -> Any:
        # In float32: writing one bfloat16 would convert the whole array (`kernels.two_byte_floats`).
        S, M = self._rows.last_token.shape[0], self._tokens
        kinds = (mixer.cached for mixer in self.model.config.mixers)
        recent = tuple(
            tuple(jnp.zeros((S, kind.heads, M, dim)) for dim in kind.stored_dims)
            if isinstance(kind, KeysValues)
            else context
            for kind, context in zip(kinds, self._contexts, strict=True)
        )
        experts, routing = self._cache.experts, self.model.config.routing
        return recent, None if routing is None else jnp.zeros((routing[0], S, M, routing[1]), experts.dtype)

    def run(
        self, step: Int[Array, ""], token_S: Int[Array, " S"], alive_S: Bool[Array, " S"], state: Any
    ) -> tuple[Array, Any]:
        rows, lora = self._rows, self._lora
        at = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, step, 1, axis=1), self._rotations)
        x = self.model.embed_tokens(token_S[:, None])
        windows = {mixer.window for mixer in self.model.config.attentions}
        visible = {
            window: _visible(rows, step, self._tokens, self._cache.page_size, window) for window in windows
        }
        kept: list[tuple] = []
        routes: list[Array] = []
        state, experts_MSTk = state
        of_mixers = iter(zip(self._contexts, state, strict=True))
        for block, pair in zip(self._blocks, self._pairs, strict=True):
            mixer = block.layer.mixer
            block_lora = LayerLora(pair, lora["scale"], rows.adapter, self._wide) if lora else None
            if mixer is None:
                x = block(x, at, None, block_lora, routes=routes)
                continue
            context, recent = next(of_mixers)

            def attend(
                q: Array, k: Array, v: Array, *sinks: Array, mixer=mixer, context=context, recent=recent
            ) -> Array:
                context_visible, recent_visible = visible[mixer.window]
                new = (x.swapaxes(1, 2).astype(jnp.float32) for x in (k, v))
                put = partial(jax.lax.dynamic_update_slice, start_indices=(0, 0, step, 0))
                now = tuple(map(put, recent, new))
                kept.append(now)
                keys, values = now[0], now[-1]
                parts = [(*context, context_visible), (keys.swapaxes(2, 3), values, recent_visible)]
                return attend_parts(q, parts, mixer.scale, *sinks)

            def on(tokens: Any, weights: Any, mixer=mixer, before=recent) -> Array:
                out, after = mix_one(mixer, tokens, weights, before)
                kept.append(where_alive(alive_S, after, before))
                return out

            mix = on if isinstance(mixer, Recurrent) else attend
            x = block(x, at, mix, block_lora, routes=routes, cached=True)
        if experts_MSTk is not None:
            chosen = jnp.stack(routes).astype(experts_MSTk.dtype)
            experts_MSTk = jax.lax.dynamic_update_slice(experts_MSTk, chosen, (0, 0, step, 0))
        return self.model.norm(x), (tuple(kept), experts_MSTk)

    def cache(self, state: Any) -> Cache:
        cache, page, offset = self._cache, *_places(self._rows, self._cache.page_size)
        state, experts_MSTk = state
        if experts_MSTk is not None:
            by_token = experts_MSTk.reshape(len(experts_MSTk), -1, experts_MSTk.shape[-1])
            cache = kv_cache.with_experts(cache, by_token, page, offset)
        for kind in cache.kinds:
            of_kind = [
                each
                for mixer, each in zip(self.model.config.mixers, state, strict=True)
                if mixer.cached == kind
            ]
            if isinstance(kind, States):
                of_all = jax.tree.map(lambda *x: jnp.stack(x), *of_kind)
                cache = cache.updated(kind, cache.states(kind).written(slice(None), self._rows.slot, of_all))
                continue
            new = [_by_token(x, self._dtype) for x in zip(*of_kind, strict=True)]
            cache = cache.updated(kind, kv_cache.write(cache.pages(kind), new, page, offset))
        return cache


def _visible(
    rows: DecodeRows, step: Int[Array, ""], M: int, page_size: int, window: int | None
) -> tuple[Bool[Array, "S 1 C"], Bool[Array, "S 1 M"]]:
    """Return which cached positions, and which of this call's M tokens, the token of step `step` sees.

    `window` is the sliding window of a layer."""
    S, P = rows.table.shape
    length = rows.position[:, None, None]
    context = jnp.arange(P * page_size)
    recent = jnp.broadcast_to(jnp.arange(M), (S, 1, M))
    context_visible, recent_visible = context < length, recent <= step
    if window is not None:
        first = length + step - window + 1
        context_visible &= context >= first
        recent_visible &= length + recent >= first
    return context_visible, recent_visible


def _places(rows: DecodeRows, page_size: int) -> tuple[Int[Array, " SM"], Int[Array, " SM"]]:
    """Return the page and offset of this call's tokens. Those without a page in the table go to page 0."""
    P = rows.table.shape[1]
    position = rows.position[:, None] + jnp.arange(rows.u.shape[0])
    column = position // page_size
    page = jnp.take_along_axis(rows.table, jnp.minimum(column, P - 1), axis=1)
    return jnp.where(column < P, page, 0).reshape(-1), (position % page_size).reshape(-1)


def _by_token(of_layers: tuple[Array, ...], dtype: Any) -> Float[Array, "SM L K H"]:
    """Lay out the keys or the values [S K M H] of several layers as `kv_cache.write` takes them."""
    x_LSKMH = jnp.stack(of_layers).astype(dtype)
    L, S, K, M, H = x_LSKMH.shape
    return x_LSKMH.transpose(1, 3, 0, 2, 4).reshape(S * M, L, K, H)
