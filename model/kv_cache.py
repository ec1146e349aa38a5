"""The paged cache of keys and values.

One pair of arrays holds the keys and values of all sequences, in pages of a fixed number of positions. A
table per sequence lists its pages in order. Sequences with a common prefix share pages, and memory is bounded
whatever the lengths are. Page 0 belongs to no sequence: padding writes there.

Heads come before positions, so that a decode step reads contiguous memory. In keys, positions come last: on a
CPU this makes the product of a query with many keys several times as fast.

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
    """All pages. Two-byte floats are stored as integers with the same bits: otherwise the CPU backend would
    convert the whole array to float32 and back to write a few bfloat16 values."""

    k: Float[Array, "L P K H Z"] | UInt16[Array, "L P K H Z"]
    v: Float[Array, "L P K Z H"] | UInt16[Array, "L P K Z H"]

    @property
    def page_size(self) -> int:
        return self.v.shape[3]


KEY_AXES: LogicalAxes = ("layers", "tokens", "kv_heads", "head_dim", "tokens")
VALUE_AXES: LogicalAxes = ("layers", "tokens", "kv_heads", "tokens", "head_dim")


def bytes_per_token(config: ModelConfig, dtype: Any) -> int:
    """Return the memory for the keys and values of one position in all layers."""
    elements = sum(2 * layer.mixer.kv_heads * layer.mixer.head_dim for layer in config.layers)
    return elements * jnp.dtype(dtype).itemsize


def kv_shape(config: ModelConfig) -> tuple[int, int]:
    """Return the number of key heads and their size, which are the same in all layers."""
    (shape,) = {(layer.mixer.kv_heads, layer.mixer.head_dim) for layer in config.layers}
    return shape


def make_pages(
    config: ModelConfig, num_pages: int, page_size: int, dtype: Any, mesh: Mesh | None = None
) -> Pages:
    """Make empty pages. `num_pages` includes page 0, which belongs to no sequence."""
    L, K, H = config.num_layers, *kv_shape(config)
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
    """Read one layer's keys and values from the pages in each row of `table_SP`, end to end.

    They have the dtype in which they were written."""
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
    """Write the keys and values of W tokens at (page, offset).

    Values that are not finite are written as zero. Masked positions are multiplied by zero, so a NaN would
    otherwise spread to the next sequence that gets the page.
    """
    k, v = (jnp.where(jnp.isfinite(new), new, 0) for new in (k_WLKH, v_WLKH))
    k, v = _stored(k), _stored(v)
    return _pinned(
        Pages(pages.k.at[:, page_W, :, :, offset_W].set(k), pages.v.at[:, page_W, :, offset_W].set(v))
    )


@partial(jax.jit, donate_argnames="pages")
def copy_pages(pages: Pages, source_W: Int[Array, " W"], target_W: Int[Array, " W"]) -> Pages:
    """Copy whole pages. Each sample of a prompt gets a copy of the prompt's last, partly filled page."""
    return _pinned(Pages(*(of.at[:, target_W].set(of[:, source_W]) for of in pages)))


def _stored(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def _pinned(pages: Pages) -> Pages:
    """Keep the sharding of the input, so that the next call does not compile another program."""
    return Pages(constrain(pages.k, KEY_AXES), constrain(pages.v, VALUE_AXES))
