"""Keys and values of past tokens, in pages.

One pair of arrays holds every sequence's keys and values, cut into pages of a fixed number of positions; a
table per sequence names its pages in order. Sequences with a common beginning share pages, and memory is
bounded whatever the lengths are. Page 0 belongs to nobody: what padding writes goes there.

Heads come before positions, which is what a decode step reads contiguously; of keys the positions come last,
for a query's product with many keys is several times as fast so on a CPU.

Axis letters: L layers, P pages, K kv heads, Z positions of a page, H head dim, S sequences, C context
positions (pages of a table laid end to end), W tokens written at once.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int, UInt16

from .config import ModelConfig
from .sharding import LogicalAxes, constrain, partition_spec


class Pages(NamedTuple):
    """Floats of two bytes are kept as integers of the same bits: to write a few bfloat16s into an array, a
    CPU converts all of it to float32 and back."""

    k: Float[Array, "L P K H Z"] | UInt16[Array, "L P K H Z"]
    v: Float[Array, "L P K Z H"] | UInt16[Array, "L P K Z H"]

    @property
    def page_size(self) -> int:
        return self.v.shape[3]


KEY_AXES: LogicalAxes = ("layers", "tokens", "kv_heads", "head_dim", "tokens")
VALUE_AXES: LogicalAxes = ("layers", "tokens", "kv_heads", "tokens", "head_dim")


def bytes_per_token(config: ModelConfig, dtype: Any) -> int:
    """Memory for one position's keys and values in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize


def make_pages(
    config: ModelConfig, num_pages: int, page_size: int, dtype: Any, mesh: Mesh | None = None
) -> Pages:
    """Empty pages; `num_pages` counts page 0, which is nobody's."""
    L, K, H = config.num_layers, config.num_kv_heads, config.head_dim
    stored = jnp.uint16 if jnp.dtype(dtype).itemsize == 2 else dtype

    def empty(shape: tuple[int, ...], axes: LogicalAxes) -> Array:
        sharding = None if mesh is None else NamedSharding(mesh, partition_spec(shape, axes, mesh))
        return jnp.zeros(shape, stored, device=sharding)

    return Pages(
        empty((L, num_pages, K, H, page_size), KEY_AXES), empty((L, num_pages, K, page_size, H), VALUE_AXES)
    )


def read_layer(
    pages: Pages, layer: int | Int[Array, ""], table_SP: Int[Array, "S P"], dtype: Any
) -> tuple[Float[Array, "S K H C"], Float[Array, "S K C H"]]:
    """One layer's keys and values, in the dtype that they were written in, of the pages in each row of
    `table_SP`, end to end."""
    S, P = table_SP.shape
    K, Z, H = pages.v.shape[2:]
    k_SPKHZ, v_SPKZH = pages.k[layer, table_SP], pages.v[layer, table_SP]
    if k_SPKHZ.dtype != dtype:
        k_SPKHZ, v_SPKZH = (jax.lax.bitcast_convert_type(x, dtype) for x in (k_SPKHZ, v_SPKZH))
    return (
        k_SPKHZ.transpose(0, 2, 3, 1, 4).reshape(S, K, H, P * Z),
        v_SPKZH.transpose(0, 2, 1, 3, 4).reshape(S, K, P * Z, H),
    )


def write(
    pages: Pages,
    k_WLKH: Float[Array, "W L K H"],
    v_WLKH: Float[Array, "W L K H"],
    page_W: Int[Array, " W"],
    offset_W: Int[Array, " W"],
) -> Pages:
    """Put the keys and values of W tokens at (page, offset).

    What is not finite is written as zero: masked positions are multiplied by zero, which would spread one
    sequence's NaN to whoever gets its page next.
    """
    k, v = (jnp.where(jnp.isfinite(new), new, 0) for new in (k_WLKH, v_WLKH))
    k, v = _stored(k), _stored(v)
    return _pinned(
        Pages(pages.k.at[:, page_W, :, :, offset_W].set(k), pages.v.at[:, page_W, :, offset_W].set(v))
    )


@partial(jax.jit, donate_argnames="pages")
def copy_pages(pages: Pages, source_W: Int[Array, " W"], target_W: Int[Array, " W"]) -> Pages:
    """Copy whole pages: the last, partly filled page of a prompt, once for each of its samples."""
    return _pinned(Pages(*(of.at[:, target_W].set(of[:, source_W]) for of in pages)))


def _stored(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def _pinned(pages: Pages) -> Pages:
    """Sharded as they came in, so that the next call needs no other program."""
    return Pages(constrain(pages.k, KEY_AXES), constrain(pages.v, VALUE_AXES))
