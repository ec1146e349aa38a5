"""Keys and values of past tokens, in pages.

One pair of arrays holds every sequence's keys and values, cut into pages of a fixed number of positions; a
table per sequence names its pages in order. Sequences with a common beginning share pages, and memory is
bounded whatever the lengths are. Page 0 belongs to nobody: what padding writes goes there.

Heads come before positions, which is what a decode step reads contiguously.

Axis letters: L layers, P pages, K kv heads, Z positions of a page, H head dim, S sequences, C context
positions (pages of a table laid end to end), W tokens written at once.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from .config import ModelConfig
from .sharding import LogicalAxes, constrain, partition_spec

_AXES: LogicalAxes = ("layers", "tokens", "kv_heads", "tokens", "head_dim")


class Pages(NamedTuple):
    k: Float[Array, "L P K Z H"]
    v: Float[Array, "L P K Z H"]

    @property
    def page_size(self) -> int:
        return self.k.shape[3]


def bytes_per_token(config: ModelConfig, dtype: Any) -> int:
    """Memory for one position's keys and values in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize


def make_pages(
    config: ModelConfig, num_pages: int, page_size: int, dtype: Any, mesh: Mesh | None = None
) -> Pages:
    """Empty pages; `num_pages` counts page 0, which is nobody's."""
    shape = (config.num_layers, num_pages, config.num_kv_heads, page_size, config.head_dim)
    sharding = None if mesh is None else NamedSharding(mesh, partition_spec(shape, _AXES, mesh))
    return Pages(*(jnp.zeros(shape, dtype, device=sharding) for _ in range(2)))


def read_layer(
    pages: Pages, layer: int | Int[Array, ""], table_SP: Int[Array, "S P"]
) -> tuple[Float[Array, "S K C H"], Float[Array, "S K C H"]]:
    """One layer's keys and values of the pages in each row of `table_SP`, end to end."""
    S, P = table_SP.shape

    def read(of: Array) -> Array:
        K, Z, H = of.shape[2:]
        return of[layer, table_SP].transpose(0, 2, 1, 3, 4).reshape(S, K, P * Z, H)

    return read(pages.k), read(pages.v)


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

    def put(into: Array, new: Array) -> Array:
        new = jnp.where(jnp.isfinite(new), new, 0)
        # pinned, so that the pages come back as they went in and the next call needs no other program
        return constrain(into.at[:, page_W, :, offset_W].set(new), _AXES)

    return Pages(put(pages.k, k_WLKH), put(pages.v, v_WLKH))


@partial(jax.jit, donate_argnames="pages")
def copy_pages(pages: Pages, source_W: Int[Array, " W"], target_W: Int[Array, " W"]) -> Pages:
    """Copy whole pages: the last, partly filled page of a prompt, once for each of its samples."""
    return Pages(*(constrain(of.at[:, target_W].set(of[:, source_W]), _AXES) for of in pages))
