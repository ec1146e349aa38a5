"""The sampler's decode program, which draws a few tokens per call. Its programs for prompts are in `prefill`.

It runs the same blocks as the trainer (`decoder.Block`), with an `attend` that reads pages of keys and
values, so that sampler and trainer compute the same log-probs. Shapes depend only on the buckets of sequences
and context pages; everything else is traced.

Axis letters: S sequences, D hidden, K kv heads, H head dim, V vocabulary, L layers, P pages of a table, C
context positions, M tokens decoded by one call, E stop tokens to compare with.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from . import kv_cache, penalties, token_sampling
from .attention import attend_parts
from .decoder import Base, logits
from .kv_cache import Pages
from .lora import LayerLora, LoraStack
from .penalties import PenaltyRows
from .token_sampling import SamplingRows
from .weights_by_layer import BaseByLayer, open_layers, open_stack


class DecodeRows(NamedTuple):
    """One row per sequence.

    `last_token` is not in the cache yet; its position is `position`, after `position` cached tokens. `budget`
    is the number of tokens that may still be drawn (0 for an empty row). `u` holds the uniforms for the draw
    of each step (`token_sampling.uniforms`). `penalties` is None if no row has any: batches with penalties
    use separate programs, so that other batches do not pay for them."""

    last_token: Int[Array, " S"]
    position: Int[Array, " S"]
    table: Int[Array, "S P"]
    adapter: Int[Array, " S"]
    budget: Int[Array, " S"]
    stop_tokens: Int[Array, "S E"]
    sampling: SamplingRows
    u: Float[Array, "M S 2"]
    penalties: PenaltyRows | None


class Decoded(NamedTuple):
    """The tokens drawn.

    `steps` of them are valid per row; entries beyond, or after a row's end, are undefined."""

    steps: Int[Array, ""]
    tokens: Int[Array, "M S"]
    logprobs: Float[Array, "M S"]
    top_tokens: Int[Array, "M S top"]
    top_logprobs: Float[Array, "M S top"]


@partial(jax.jit, static_argnames="graph", donate_argnames="pages")
def decode(
    graph: nnx.GraphDef,
    base: Base | BaseByLayer,
    pages: Pages,
    lora: LoraStack | None,
    rows: DecodeRows,
    want_top: Bool[Array, ""],
) -> tuple[Pages, Decoded]:
    """Draw up to M tokens for every row, or fewer if all rows end earlier.

    The context is read from the pages once. Keys and values of the new tokens are held beside it and written
    to the pages together at the end. A row ends when its budget is spent or one of its `stop_tokens` is drawn
    (-1 is no token). `base` and `lora` may come from `weights_by_layer`.
    """
    # Cut into layers outside the loop over tokens; inside, XLA would repeat it for every token.
    model, blocks, head_VD, wide = open_layers(graph, base)
    config = model.config
    S, V = rows.last_token.shape[0], config.vocab_size
    L, K, H = config.num_layers, *kv_cache.kv_shape(config)
    dtype = model.norm.weight.dtype
    contexts = [kv_cache.read_layer(pages, layer, rows.table, dtype) for layer in range(L)]
    pairs = open_stack(lora["layers"], config) if lora and lora["layers"] else ({},) * L
    windows = {layer.mixer.window for layer in config.layers}
    sample = partial(token_sampling.sample_tokens, rows=rows.sampling, want_top=want_top)
    M, top = rows.u.shape[0], min(token_sampling.TOP_K, V)

    def going(state: tuple) -> Array:
        step, alive, *_ = state
        return (step < M) & alive.any()

    def one_token(state: tuple) -> tuple:
        step, alive, token, recent, seen, out = state
        at = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, step, 1, axis=1), rotations)
        x = model.embed_tokens(token[:, None])
        visible = {window: _visible(rows, step, M, pages.page_size, window) for window in windows}
        kept = []
        for block, context, layer_recent, pair in zip(blocks, contexts, recent, pairs, strict=True):
            mixer = block.layer.mixer

            def attend(
                q: Array, k: Array, v: Array, mixer=mixer, context=context, layer_recent=layer_recent
            ) -> Array:
                context_visible, recent_visible = visible[mixer.window]
                new = (x.swapaxes(1, 2).astype(jnp.float32) for x in (k, v))
                put = partial(jax.lax.dynamic_update_slice, start_indices=(0, 0, step, 0))
                keys, values = now = tuple(map(put, layer_recent, new))
                kept.append(now)
                parts = [(*context, context_visible), (keys.swapaxes(2, 3), values, recent_visible)]
                return attend_parts(q, parts, mixer.scale)

            x = block(x, at, attend, LayerLora(pair, lora["scale"], rows.adapter, wide) if lora else None)
        z = logits(head_VD, lora, model.norm(x), rows.adapter)[:, 0]
        if rows.penalties is not None:
            z = penalties.penalized(z, rows.penalties, seen)
        drawn = sample(z, u=rows.u[step])
        if rows.penalties is not None:
            seen = penalties.after(seen, drawn.tokens)
        out = jax.tree.map(lambda all_, new: all_.at[step].set(new), out, tuple(drawn))
        alive &= (step + 1 < rows.budget) & (drawn.tokens[:, None] != rows.stop_tokens).all(-1)
        return step + 1, alive, drawn.tokens, tuple(kept), seen, out

    # Computed for all tokens before the loop; inside, XLA would recompute the cosines in every block.
    rotations = model.rotations(rows.position[:, None] + jnp.arange(M))
    # In float32: to write one bfloat16 into an array, the CPU backend converts the whole array to float32 and
    # back.
    recent = ((jnp.zeros((S, K, M, H)),) * 2,) * L
    out = (
        jnp.zeros((M, S), jnp.int32),
        jnp.zeros((M, S), jnp.float32),
        jnp.zeros((M, S, top), jnp.int32),
        jnp.zeros((M, S, top), jnp.float32),
    )
    seen = None if rows.penalties is None else penalties.seen_so_far(rows.penalties, V)
    start = (jnp.int32(0), rows.budget > 0, rows.last_token, recent, seen, out)
    steps, _, _, recent, _, out = jax.lax.while_loop(going, one_token, start)
    return _append(pages, rows, recent, dtype), Decoded(steps, *out)


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


def _append(pages: Pages, rows: DecodeRows, recent: Any, dtype: Any) -> Pages:
    """Write this call's keys and values to the pages. Those without a page in the table go to page 0."""
    S, P = rows.table.shape
    M = rows.u.shape[0]
    position = rows.position[:, None] + jnp.arange(M)
    column = position // pages.page_size
    page = jnp.take_along_axis(rows.table, jnp.minimum(column, P - 1), axis=1)
    page = jnp.where(column < P, page, 0).reshape(-1)

    k_LSKMH, v_LSKMH = (jnp.stack(of).astype(dtype) for of in zip(*recent, strict=True))
    L, _, K, _, H = v_LSKMH.shape
    k_WLKH, v_WLKH = (x.transpose(1, 3, 0, 2, 4).reshape(S * M, L, K, H) for x in (k_LSKMH, v_LSKMH))
    return kv_cache.write(pages, k_WLKH, v_WLKH, page, (position % pages.page_size).reshape(-1))
