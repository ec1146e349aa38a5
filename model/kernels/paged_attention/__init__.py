"""Attention of new tokens to keys and values in pages (`model.kv_cache`), read in place.

    cpu        its own layout and its own decode program (`cpu.py`)
    reference  plain XLA, on every device
    gpu        a Triton kernel; XLA for heads whose size is not a power of two
    tpu        the kernel of jax.experimental.pallas; XLA with a sliding window or sinks, in float32, and
               for heads whose size is not a multiple of 128

Letters: S sequences, T new tokens of each, N query heads, K kv heads, H head dim, L layers, P pages of a
table, Z positions of a page, X = pages of all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from ...sharding import LogicalAxes, partition_spec
from . import reference
from .pages import LAYOUTS, Pages

_TPU_LANES = 128  # head sizes that the TPU's kernel takes are multiples of it
_QUERY: LogicalAxes = ("sequences", "cached_heads", "head_dim")
_TABLE: LogicalAxes = ("sequences", "tokens")


def decode_attention(
    q_SNH: Float[Array, "S N H"],
    pages: Pages,
    layer: Int[Array, ""],
    table_SP: Int[Array, "S P"],
    first_S: Int[Array, " S"] | None,
    length_S: Int[Array, " S"],
    scale: float,
    sinks_N: Float[Array, " N"] | None = None,
) -> Float[Array, "S N H"]:
    """Return softmax(scale * q k^T) v over positions first <= p < length of each sequence, in q's dtype.

    No copy of the pages is made. `first_S` is None in layers without a sliding window; `length_S` is at
    least 1. `sinks_N` are `with_sinks`'.
    """
    k_pages, v_pages = _keys_values(pages)
    table_SP = table_SP + layer * pages.num_pages
    # With float32 inputs the TPU's kernel computes in bfloat16.
    has_tpu_kernel = q_SNH.dtype == jnp.bfloat16 and q_SNH.shape[-1] % _TPU_LANES == 0
    if pages.backend == "tpu" and first_S is None and sinks_N is None and has_tpu_kernel:
        from . import tpu

        run = partial(tpu.attend, scale=scale)
        return _by_shard(run, pages, q_SNH, k_pages, v_pages, table_SP, length_S)
    first_S = jnp.zeros_like(length_S) if first_S is None else first_S
    if pages.backend == "gpu" and q_SNH.shape[-1].bit_count() == 1:
        from . import gpu

        run = partial(gpu.attend, scale=scale)
        out, lse = _by_shard(run, pages, q_SNH, k_pages, v_pages, table_SP, first_S, length_S)
        found = out[:, None], lse[:, None]
    else:
        q_S1NH, first_S1 = q_SNH[:, None], first_S[:, None]
        found = _reference(q_S1NH, pages, k_pages, v_pages, table_SP, first_S1, length_S, scale)
    return with_sinks(found, sinks_N)[0][:, 0].astype(q_SNH.dtype)


def context_attention(
    q_STNH: Float[Array, "S T N H"],
    pages: Pages,
    layer: Int[Array, ""],
    table_SP: Int[Array, "S P"],
    first_ST: Int[Array, "S T"],
    length_S: Int[Array, " S"],
    scale: float,
) -> tuple[Float[Array, "S T N H"], Float[Array, "S T N"]]:
    """Return what T tokens of a sequence read from its cached positions, in float32, and the log-sum-exp of
    their scores (`reference.attend`)."""
    k_pages, v_pages = _keys_values(pages)
    table_SP = table_SP + layer * pages.num_pages
    return _reference(q_STNH, pages, k_pages, v_pages, table_SP, first_ST, length_S, scale)


def merge(
    one: tuple[Float[Array, "S T N H"], Float[Array, "S T N"]],
    other: tuple[Float[Array, "S T N H"], Float[Array, "S T N"]],
) -> Float[Array, "S T N H"]:
    """Return attention to two sets of keys, from the attention to each and its log-sum-exp."""
    (out, lse), (other_out, other_lse) = one, other
    share = jax.nn.sigmoid(lse - other_lse)[..., None]
    return out.astype(jnp.float32) * share + other_out.astype(jnp.float32) * (1 - share)


def with_sinks(
    found: tuple[Float[Array, "S T N H"], Float[Array, "S T N"]], sinks_N: Float[Array, " N"] | None
) -> tuple[Float[Array, "S T N H"], Float[Array, "S T N"]]:
    """Return attention and its log-sum-exp with a sink per head in the softmax: a key that has no value."""
    if sinks_N is None:
        return found
    out, lse = found
    sinks = sinks_N.astype(jnp.float32)
    return out.astype(jnp.float32) * jax.nn.sigmoid(lse - sinks)[..., None], jnp.logaddexp(lse, sinks)


def write_layer(
    pages: Pages,
    layer: Int[Array, ""],
    new: Sequence[Float[Array, "W K H"]],
    page_W: Int[Array, " W"],
    offset_W: Int[Array, " W"],
) -> list[Array]:
    """Return the arrays that `pages` stores with one layer's keys, and values if they are stored, of W tokens
    at (page, offset)."""
    new = [x.astype(pages.k.dtype) for x in new]
    if pages.backend != "tpu":
        return [
            x.at[layer, page_W, :, offset_W].set(of_tokens)
            for x, of_tokens in zip(pages.stored, new, strict=True)
        ]
    from . import tpu

    def write(stored: list[Array], new: list[Array], *where: Array) -> list[Array]:
        layer, *places = where
        return [tpu.write(x, layer, of_tokens, *places) for x, of_tokens in zip(stored, new, strict=True)]

    where = (layer, page_W, offset_W)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        heads = partition_spec(pages.k.shape, LAYOUTS["tpu"][0], mesh)[0]
        of_pages, of_tokens, everywhere = PartitionSpec(heads), PartitionSpec(None, heads), PartitionSpec()
        write = jax.shard_map(
            write,
            in_specs=(of_pages, of_tokens, *[everywhere] * 3),
            out_specs=of_pages,
            check_vma=False,
        )
    return write(pages.stored, new, *where)


def _reference(q, pages, k_pages, v_pages, table, first, length, scale):
    axis = 1 if pages.backend == "tpu" else 0
    return reference.attend(q, k_pages, v_pages, table, first, length, scale, pages_axis=axis)


def _keys_values(pages: Pages) -> tuple[Array, Array]:
    """Return the keys and the values of all layers' pages. Where values are not stored, these are the whole
    keys."""
    k_pages, *v_pages = (_of_all_layers(x, pages.backend) for x in pages.stored)
    return k_pages, v_pages[0] if v_pages else k_pages


def _of_all_layers(x: Array, backend: str) -> Array:
    """Merge the axes of layers and pages, which lie side by side; a view."""
    at = 1 if backend == "tpu" else 0
    return x.reshape(*x.shape[:at], -1, *x.shape[at + 2 :])


def _by_shard(run, pages: Pages, q_SNH: Array, k_pages: Array, v_pages: Array, table_SP: Array, *rows_S):
    """Call a kernel on every device's share of sequences and heads: XLA cannot partition it."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return run(q_SNH, k_pages, v_pages, table_SP, *rows_S)
    K = pages.size("cached_heads")
    query = partition_spec((q_SNH.shape[0], K, q_SNH.shape[2]), _QUERY, mesh)
    axes: list = [None] * 4
    axes[0 if pages.backend == "tpu" else 1] = query[1]
    of_pages, of_rows = PartitionSpec(*axes), PartitionSpec(query[0])
    table = partition_spec(table_SP.shape, _TABLE, mesh)
    return jax.shard_map(
        run,
        in_specs=(query, of_pages, of_pages, table, *[of_rows] * len(rows_S)),
        out_specs=query if pages.backend == "tpu" else (query, PartitionSpec(*query[:2])),
        check_vma=False,
    )(q_SNH, k_pages, v_pages, table_SP, *rows_S)
