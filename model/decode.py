"""The sampler's three programs: prefill a chunk of prompts, score prompt tokens, decode a few tokens.

They run the trainer's own blocks (`decoder.Block`) with an `attend` that reads and writes pages of keys and
values, so that sampler and trainer compute the same log-probs. Shapes depend only on the bucket of
sequences, of context pages and of prefilled tokens; everything else is traced.

Axis letters: S sequences, T tokens of a prefill row, D hidden, N query heads, K kv heads, G = N / K, H head
dim, V vocabulary, L layers, P pages of a table, C context positions, M tokens decoded by one call, E stop
tokens looked at.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from . import kv_cache, penalties, token_sampling
from .attention import MASKED, attention
from .config import ModelConfig
from .decoder import Base, product_by_output, unembed, visible_from
from .kv_cache import Pages
from .lora import LayerLora, LoraStack, delta
from .penalties import PenaltyRows
from .token_sampling import SamplingRows
from .weights_by_layer import BaseByLayer, open_layers, open_stack


class PrefillRow(NamedTuple):
    """One row of prompt tokens: several whole prompts, or a piece of one that continues `table`'s pages.

    `start` is the first token of the row that belongs to the same prompt. `page`, `offset` say where each
    token's key and value go (page 0 for padding). The first `context` positions of `table` are the prompt's
    beginning, already cached (only for a row of one prompt; else the table is empty).
    """

    tokens: Int[Array, " T"]
    position: Int[Array, " T"]
    start: Int[Array, " T"]
    page: Int[Array, " T"]
    offset: Int[Array, " T"]
    table: Int[Array, " P"]
    context: Int[Array, ""]


@partial(jax.jit, static_argnames="graph", donate_argnames="pages")
def prefill(
    graph: nnx.GraphDef, base: Base, pages: Pages, lora: LoraStack | None, row: PrefillRow
) -> tuple[Pages, Float[Array, "T D"]]:
    """Run prompt tokens through the trunk, keep their keys and values, return the final hidden states.

    `lora` holds one adapter."""
    model = nnx.merge(graph, base)
    config = model.config
    context_visible, own_visible = _visible_in_prompt(config, row, pages.page_size)
    at = model.rotation(row.position[None])
    block_graph, stacked = nnx.split(model.layers)

    def step(x_BTD: Array, layer: tuple) -> tuple[Array, tuple]:
        weights, pairs, index = layer
        kept = []

        def attend(q: Array, k: Array, v: Array) -> Array:
            kept.extend((k[0], v[0]))
            if not len(row.table):
                return attention(q, k, v, visible_from(config, row.start[None]), config.head_dim**-0.5)
            context = kv_cache.read_layer(pages, index, row.table[None], q.dtype)
            own = (k.transpose(0, 2, 3, 1), v.swapaxes(1, 2), own_visible)
            parts = [(*context, context_visible), own]
            return _attend_parts(q, parts, config.head_dim**-0.5)

        block_lora = None if lora is None else LayerLora(pairs, lora["scale"], None)
        x_BTD = nnx.merge(block_graph, weights)(x_BTD, at, attend, block_lora)
        return x_BTD, tuple(kept)

    x_BTD = model.embed_tokens(row.tokens[None])
    layers = (stacked, {} if lora is None else lora["layers"], jnp.arange(config.num_layers))
    x_BTD, (k_LTKH, v_LTKH) = jax.lax.scan(step, x_BTD, layers)
    pages = kv_cache.write(pages, k_LTKH.swapaxes(0, 1), v_LTKH.swapaxes(0, 1), row.page, row.offset)
    return pages, model.norm(x_BTD)[0]


def _visible_in_prompt(
    config: ModelConfig, row: PrefillRow, page_size: int
) -> tuple[Bool[Array, "1 T C"], Bool[Array, "1 T T"]]:
    """Which positions of the cached beginning, and which of the row, each token of the row sees."""
    context, own = jnp.arange(row.table.shape[0] * page_size), jnp.arange(row.tokens.shape[0])
    first = jnp.zeros_like(row.position)
    if config.sliding_window is not None:
        first = row.position - config.sliding_window + 1
    context_visible = (context < row.context) & (context >= first[:, None])
    own_visible = (own <= own[:, None]) & (row.position >= first[:, None]) & (own >= row.start[:, None])
    return context_visible[None], own_visible[None]


class PromptScores(NamedTuple):
    """Log-probs (temperature 1) of W given next tokens, of the most likely ones where asked for, and of A
    that are drawn."""

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
    """log p(next token | tokens so far) from prefill's hidden states, a few tokens' logits at a time.

    Next tokens are also drawn, A times with replacement, at `temperature_T` (0: the most likely one) from
    the uniforms `u_TA2`."""
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


class DecodeRows(NamedTuple):
    """One row per sequence. `last_token` is not in the cache yet; it stands at `position`, after `position`
    cached tokens. `budget` is how many tokens the sequence may still get (0 for an empty row). `u` are the
    uniforms of each step's draw (`token_sampling.uniforms`). Without `penalties` on any row there are None:
    these are programs of their own, and the others pay nothing for them."""

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
    """`steps` tokens per row were drawn; what lies beyond, or after a row's end, means nothing."""

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
    """Draw up to M tokens for every row, fewer if all rows end earlier.

    The context is read from the pages once; the tokens decoded here keep their keys and values beside it, and
    are written to the pages together at the end. A row ends when its budget is spent or one of `stop_tokens`
    (-1 is none) was drawn. `base` and `lora` may come from `weights_by_layer`.
    """
    # Cut into layers outside of the loop over tokens, where XLA would do it again for every token.
    model, blocks, head_VD, wide = open_layers(graph, base)
    config = model.config
    S, V = rows.last_token.shape[0], config.vocab_size
    L, K, H = config.num_layers, config.num_kv_heads, config.head_dim
    dtype = model.norm.weight.dtype
    contexts = [
        tuple(x.astype(wide) for x in kv_cache.read_layer(pages, layer, rows.table, dtype))
        for layer in range(L)
    ]
    pairs = open_stack(lora["layers"]) if lora and lora["layers"] else ({},) * L
    sample = partial(token_sampling.sample_tokens, rows=rows.sampling, want_top=want_top)
    M, top = rows.u.shape[0], min(token_sampling.TOP_K, V)

    def going(state: tuple) -> Array:
        step, alive, *_ = state
        return (step < M) & alive.any()

    def one_token(state: tuple) -> tuple:
        step, alive, token, recent, seen, out = state
        position = rows.position + step
        at = model.rotation(position[:, None])
        x = model.embed_tokens(token[:, None])
        context_visible, recent_visible = _visible(config, rows, step, M, pages.page_size)
        kept = []
        for block, context, layer_recent, pair in zip(blocks, contexts, recent, pairs, strict=True):

            def attend(q: Array, k: Array, v: Array, context=context, layer_recent=layer_recent) -> Array:
                put, (keys, values) = jax.lax.dynamic_update_slice, layer_recent
                now = (
                    put(keys, k.astype(wide).transpose(0, 2, 3, 1), (0, 0, 0, step)),
                    put(values, v.astype(wide).swapaxes(1, 2), (0, 0, step, 0)),
                )
                kept.append(now)
                parts = [(*context, context_visible), (*now, recent_visible)]
                return _attend_parts(q.astype(wide), parts, config.head_dim**-0.5).astype(dtype)

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

    recent = tuple((jnp.zeros((S, K, H, M), wide), jnp.zeros((S, K, M, H), wide)) for _ in range(L))
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


def logits(
    head_VD: Float[Array, "V D"],
    lora: LoraStack | None,
    hidden_BTD: Float[Array, "B T D"],
    row_adapter_B: Int[Array, " B"] | None,
) -> Float[Array, "B T V"]:
    """Float32 logits, with the adapter on the head where there is one."""
    z = product_by_output(hidden_BTD, head_VD)
    if lora is not None and "unembed" in lora:
        z = z + delta(hidden_BTD.astype(jnp.float32), lora["unembed"], lora["scale"], row_adapter_B)
    return z


def _visible(
    config: ModelConfig, rows: DecodeRows, step: Int[Array, ""], M: int, page_size: int
) -> tuple[Bool[Array, "S 1 C"], Bool[Array, "S 1 M"]]:
    """Which cached positions, and which of this call's M, a token of step `step` sees."""
    S, P = rows.table.shape
    length = rows.position[:, None, None]
    context = jnp.arange(P * page_size)
    recent = jnp.broadcast_to(jnp.arange(M), (S, 1, M))
    context_visible, recent_visible = context < length, recent <= step
    if config.sliding_window is not None:
        first = length + step - config.sliding_window + 1
        context_visible &= context >= first
        recent_visible &= length + recent >= first
    return context_visible, recent_visible


def _attend_parts(
    q_STNH: Float[Array, "S T N H"],
    parts: list[tuple[Array, Array, Array]],
    scale: float,
) -> Float[Array, "S T N H"]:
    """softmax(scale * q k^T) v over keys that lie in several arrays; softmax in float32.

    A part is (k [S K H C], v [S K C H], visible [S T C]).
    """
    S, T, N, H = q_STNH.shape
    K = parts[0][0].shape[1]
    q = (q_STNH * jnp.asarray(scale, q_STNH.dtype)).reshape(S, T, K, N // K, H)
    q = q.transpose(0, 2, 3, 1, 4).reshape(S, K, N // K * T, H)

    def scores(keys: Array, visible: Array) -> Array:
        found = jnp.einsum("skqh,skhc->skqc", q, keys).astype(jnp.float32)
        found = found.reshape(S, K, N // K, T, keys.shape[3])
        return jnp.where(visible[:, None, None], found, MASKED)

    found = [scores(k, visible) for k, _, visible in parts]
    highest = jnp.stack([z.max(-1) for z in found]).max(0)[..., None]
    weights = [jnp.exp(z - highest) for z in found]
    total = sum(w.sum(-1, keepdims=True) for w in weights)
    mixed = sum(
        jnp.einsum("skqc,skch->skqh", (w / total).astype(v.dtype).reshape(S, K, N // K * T, -1), v)
        for w, (_, v, _) in zip(weights, parts, strict=True)
    )
    return mixed.reshape(S, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(S, T, N, H)


def _append(pages: Pages, rows: DecodeRows, recent: Any, dtype: Any) -> Pages:
    """Write this call's keys and values to the pages; what has no page in the table goes to page 0."""
    S, P = rows.table.shape
    M = recent[0][0].shape[3]
    position = rows.position[:, None] + jnp.arange(M)
    column = position // pages.page_size
    page = jnp.take_along_axis(rows.table, jnp.minimum(column, P - 1), axis=1)
    page = jnp.where(column < P, page, 0).reshape(-1)

    k_LSKHM, v_LSKMH = (jnp.stack(of).astype(dtype) for of in zip(*recent, strict=True))
    L, _, K, _, H = v_LSKMH.shape
    k_WLKH = k_LSKHM.transpose(1, 4, 0, 2, 3).reshape(S * M, L, K, H)
    v_WLKH = v_LSKMH.transpose(1, 3, 0, 2, 4).reshape(S * M, L, K, H)
    return kv_cache.write(pages, k_WLKH, v_WLKH, page, (position % pages.page_size).reshape(-1))
