"""Pure functions that the trainer compiles: arrays in, arrays out.

Axis letters: B rows, T tokens in a row, K targets per token, P config values, n adapters in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ...losses import FUNCTIONS, gspo, loss_and_slope
from ...losses.linear_logprobs import HeadOutput, linear_logprobs, linear_logprobs_and_gradient
from ...model import decoder, sharding
from ...model.lora import stack_adapters

TOKEN_LOSSES = tuple(loss for loss in FUNCTIONS if not loss.sequence_level)
ALL_LOSSES = (*TOKEN_LOSSES, *(loss for loss in FUNCTIONS if loss.sequence_level))
BATCH_INPUTS = ("weights", "logprobs", "advantages", "reference_logprobs")
SEQUENCE_INPUTS = ("sequence_ratio_mask",)
LOSS_INDEX = {loss.function: index for index, loss in enumerate(ALL_LOSSES)}


class Static(NamedTuple):
    """The static arguments of a program, besides shapes."""

    graph: Any
    dtype: Any  # of the base and the activations
    remat: str
    chunk_tokens: int
    sequence_level: bool  # some row's loss needs the log-probs of whole sequences first


class Batch(NamedTuple):
    """One micro-batch. `inputs` are the losses' per-token inputs [B, T, K] float32, zero where absent."""

    tokens: jax.Array  # [B, T] int32
    position: jax.Array  # [B, T] int32, within the datum
    start: jax.Array  # [B, T] int32, first visible key
    real: jax.Array  # [B, T, K] bool, False on padding
    targets: jax.Array  # [B, T, K] int32
    inputs: dict[str, jax.Array]
    adapter: jax.Array  # [B] int32, which of the n adapters
    loss: jax.Array  # [B] int32, LOSS_INDEX
    config: jax.Array  # [B, P] float32
    experts: jax.Array | None = None  # [B, T, M, k] int16, the experts to use in layers with experts; -1: any


class Outputs(NamedTuple):
    """The values from which the client's answer is made."""

    logprobs: jax.Array  # [B, T, K] float32
    losses: jax.Array  # [B, T, K] float32
    loss: jax.Array  # [B] float32, summed over the row
    expert_tokens: jax.Array | None = (
        None  # [M, B, E] int32: tokens of a row by layer with experts and expert
    )


def forward_backward_adapters(
    static: Static, base: Any, adapters: tuple, scale_n: jax.Array, gradients: tuple, batch: Batch
) -> tuple[tuple, Outputs]:
    """Return `gradients` plus those of this micro-batch, one float32 tree per adapter, and the outputs."""

    def hidden_of(adapters):
        stack = stack_adapters(adapters, scale_n)
        return _trunk(static, base, batch, stack)

    hidden, pull, tokens = jax.vjp(hidden_of, adapters, has_aux=True)
    head = _on_own_rows(_head, static, hidden, decoder.unembed(base), batch, _head_lora(adapters, scale_n))
    (new,) = pull(head.d_hidden)
    if head.d_lora is not None:
        new = tuple(
            tree | {"unembed": {"a": head.d_lora["a"][i], "b": head.d_lora["b"][i]}}
            for i, tree in enumerate(new)
        )
    return jax.tree.map(jnp.add, gradients, new), Outputs(head.logprobs, head.losses, head.loss, tokens)


def forward_backward_weights(
    static: Static, weights: Any, gradients: Any, batch: Batch
) -> tuple[Any, Outputs]:
    """Return the same for full weights: `weights` are the float32 base, computed with in `static.dtype`."""

    def hidden_of(weights):
        return _trunk(static, _cast_matrices(static, weights), batch, None)

    hidden, pull, tokens = jax.vjp(hidden_of, weights, has_aux=True)
    unembed = decoder.unembed(_cast(static, weights))
    head = _on_own_rows(partial(_head, train_unembed=True), static, hidden, unembed, batch, None)
    (new,) = pull(head.d_hidden)
    assert head.d_unembed is not None  # train_unembed
    if "lm_head" in new:
        new["lm_head"]["weight"] += head.d_unembed.T
    else:
        new["embed_tokens"]["weight"] += head.d_unembed
    return jax.tree.map(jnp.add, gradients, new), Outputs(head.logprobs, head.losses, head.loss, tokens)


def forward_adapters(static: Static, base: Any, adapters: tuple, scale_n: jax.Array, batch: Batch) -> Outputs:
    """Return log-probs and losses without gradients."""
    hidden, _ = _trunk(static, base, batch, stack_adapters(adapters, scale_n))
    lora = _head_lora(adapters, scale_n)
    return _on_own_rows(_evaluate, static, hidden, decoder.unembed(base), batch, lora)


def forward_weights(static: Static, weights: Any, batch: Batch) -> Outputs:
    """Return log-probs and losses without gradients, for full weights."""
    base = _cast(static, weights)
    hidden, _ = _trunk(static, base, batch, None)
    return _on_own_rows(_evaluate, static, hidden, decoder.unembed(base), batch, None)


def accumulate(total: Any, addition: Any) -> tuple[Any, jax.Array]:
    """Return total + addition, and whether all of it is finite."""
    summed = jax.tree.map(jnp.add, total, addition)
    return summed, jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(summed)]).all()


def _trunk(static: Static, base: Any, batch: Batch, stack: Any) -> tuple[jax.Array, jax.Array | None]:
    return decoder.routed_trunk(
        static.graph,
        base,
        batch.tokens,
        batch.position,
        batch.start,
        batch.real.any(-1),
        stack,
        batch.adapter,
        remat=static.remat,
        replayed_BTMk=batch.experts,
    )


def _cast_matrices(static: Static, weights: Any) -> Any:
    """Cast the linears' weights.

    The embedding, norms and biases stay in float32: their gradients are plain sums over tokens, in which each
    addition would round. Products sum in float32 anyway.
    """

    def cast(path: tuple, leaf: jax.Array) -> jax.Array:
        is_matrix = path[0].key == "layers" and path[-1].key == "weight" and leaf.ndim > 2
        return leaf.astype(static.dtype) if is_matrix else leaf

    return jax.tree_util.tree_map_with_path(cast, weights)


def _cast(static: Static, weights: Any) -> Any:
    return jax.tree.map(lambda w: w.astype(static.dtype), weights)


def _head_lora(adapters: tuple, scale_n: jax.Array) -> dict[str, jax.Array] | None:
    if "unembed" not in adapters[0]:
        return None
    return {
        "a": jnp.stack([adapter["unembed"]["a"] for adapter in adapters]),
        "b": jnp.stack([adapter["unembed"]["b"] for adapter in adapters]),
        "scale": scale_n,
    }


def _on_own_rows(
    function: Callable[..., Any],
    static: Static,
    hidden: jax.Array,
    unembed: jax.Array,
    batch: Batch,
    lora: Any,
) -> Any:
    """Return `function(static, hidden, unembed, batch, lora)`, where every device computes its own rows.

    So the unembedding is gathered once, not for every chunk of tokens; chunks are counted on each device; and
    the gradients of the head are summed over devices once, at the end. The mesh's other axes stay XLA's.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(name for name in sharding.RULES["rows"] if mesh.shape.get(name, 1) > 1)
    if not axes or len(hidden) % math.prod(mesh.shape[name] for name in axes):
        return function(static, hidden, unembed, batch, lora)
    rows, whole = PartitionSpec(axes), PartitionSpec()

    def own(hidden: jax.Array, unembed: jax.Array, batch: Batch, lora: Any) -> Any:
        found = function(static, hidden, unembed, batch, lora)
        if isinstance(found, HeadOutput):
            parts = jax.lax.psum((found.d_unembed, found.d_lora), axes)
            found = found._replace(d_unembed=parts[0], d_lora=parts[1])
        return found

    specs: Any = rows
    if function is not _evaluate:
        specs = HeadOutput(rows, rows, rows, rows, whole, whole)
    on_devices = jax.shard_map(
        own,
        in_specs=(rows, whole, rows, whole),
        out_specs=specs,
        axis_names=set(axes),
        check_vma=False,
    )
    return on_devices(hidden, sharding.constrain(unembed, ("vocab", "hidden")), batch, lora)


def _head(
    static: Static, hidden: jax.Array, unembed: jax.Array, batch: Batch, lora, train_unembed: bool = False
) -> HeadOutput:
    inputs = dict(batch.inputs)
    if static.sequence_level:
        logprobs = linear_logprobs(hidden, unembed, batch.targets, lora, batch.adapter, static.chunk_tokens)
        inputs["sequence_log_ratio"] = _sequence_log_ratio(logprobs, batch)
    return linear_logprobs_and_gradient(
        hidden,
        unembed,
        batch.targets,
        (inputs, batch.real),
        lambda logprobs, chunk: _row_losses(static, logprobs, chunk[0], chunk[1], batch),
        lora,
        batch.adapter,
        train_unembed=train_unembed,
        chunk_tokens=static.chunk_tokens,
    )


def _evaluate(static: Static, hidden: jax.Array, unembed: jax.Array, batch: Batch, lora) -> Outputs:
    logprobs = linear_logprobs(hidden, unembed, batch.targets, lora, batch.adapter, static.chunk_tokens)
    inputs = dict(batch.inputs)
    if static.sequence_level:
        inputs["sequence_log_ratio"] = _sequence_log_ratio(logprobs, batch)
    loss, _ = _row_losses(static, logprobs, inputs, batch.real, batch)
    return Outputs(logprobs, loss, loss.sum((1, 2)))


def _row_losses(static: Static, logprobs, inputs, real, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Return each row's own loss and its slope [B, C, K], zero on padding."""
    losses = ALL_LOSSES if static.sequence_level else TOKEN_LOSSES

    def of_row(index, logprobs, inputs, config):
        return loss_and_slope(losses, index, logprobs, inputs, config)

    loss, slope = jax.vmap(of_row)(batch.loss, logprobs, inputs, batch.config)
    return jnp.where(real, loss, 0.0), jnp.where(real, slope, 0.0)


def _sequence_log_ratio(logprobs: jax.Array, batch: Batch) -> jax.Array:
    """Return [B, T, K] of the first target of each token (sequence-level losses have one)."""
    segment = jnp.arange(batch.tokens.shape[1]) - batch.position
    ratio = gspo.sequence_log_ratio(
        logprobs[..., 0],
        batch.inputs["logprobs"][..., 0],
        batch.inputs["sequence_ratio_mask"][..., 0],
        segment,
    )
    return jnp.broadcast_to(ratio[..., None], logprobs.shape)
