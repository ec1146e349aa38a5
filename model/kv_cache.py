"""The paged cache of keys and values.

One pair of arrays holds the keys and values of all sequences, in pages of a fixed number of positions. A
table per sequence lists its pages in order. Sequences with a common prefix share pages, and memory is bounded
whatever the lengths are. Page 0 belongs to no sequence: padding writes there. The layout of the arrays
depends on the backend whose kernel reads them (`kernels.paged_attention.pages`).

Axis letters: L layers, K kv heads, H head dim, W tokens written at once.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from .config import ModelConfig
from .kernels import paged_attention
from .kernels.backends import Backend
from .kernels.paged_attention import cpu
from .kernels.paged_attention.pages import LAYOUTS, Pages
from .sharding import LogicalAxes, constrain, partition_spec


def bytes_per_token(config: ModelConfig, dtype: Any) -> int:
    """Return the memory for the keys and values of one position in all layers."""
    elements = sum(2 * layer.mixer.kv_heads * layer.mixer.head_dim for layer in config.layers)
    return elements * jnp.dtype(dtype).itemsize


def kv_shape(config: ModelConfig) -> tuple[int, int]:
    """Return the number of key heads and their size, which are the same in all layers."""
    (shape,) = {(layer.mixer.kv_heads, layer.mixer.head_dim) for layer in config.layers}
    return shape


def make_pages(
    config: ModelConfig,
    num_pages: int,
    page_size: int,
    dtype: Any,
    mesh: Mesh | None = None,
    backend: Backend = "cpu",
) -> Pages:
    """Make empty pages. `num_pages` includes page 0, which belongs to no sequence."""
    K, H = kv_shape(config)
    sizes = {
        "layers": config.num_layers,
        "pages": num_pages,
        "kv_heads": K,
        "cached_heads": K,
        "positions": page_size,
        "head_dim": H,
    }

    def empty(axes: LogicalAxes) -> Array:
        shape = tuple(sizes[axis] for axis in axes)
        sharding = None if mesh is None else NamedSharding(mesh, partition_spec(shape, axes, mesh))
        return jnp.zeros(shape, cpu.stored_dtype(dtype) if backend == "cpu" else dtype, device=sharding)

    keys, values = LAYOUTS[backend]
    return Pages(empty(keys), empty(values), backend)


def write(
    pages: Pages,
    k_WLKH: Float[Array, "W L K H"],
    v_WLKH: Float[Array, "W L K H"],
    page_W: Int[Array, " W"],
    offset_W: Int[Array, " W"],
) -> Pages:
    """Write the keys and values of W tokens, in all layers, at (page, offset). On a CPU only."""
    return _pinned(pages, *cpu.write(pages, _finite(k_WLKH), _finite(v_WLKH), page_W, offset_W))


def write_layer(
    pages: Pages,
    layer: Int[Array, ""],
    k_WKH: Float[Array, "W K H"],
    v_WKH: Float[Array, "W K H"],
    page_W: Int[Array, " W"],
    offset_W: Int[Array, " W"],
) -> Pages:
    """Write one layer's keys and values of W tokens at (page, offset). Not on a CPU."""
    new = _finite(k_WKH), _finite(v_WKH)
    return _pinned(pages, *paged_attention.write_layer(pages, layer, *new, page_W, offset_W))


@partial(jax.jit, donate_argnames="pages")
def copy_pages(pages: Pages, source_W: Int[Array, " W"], target_W: Int[Array, " W"]) -> Pages:
    """Copy whole pages. Each sample of a prompt gets a copy of the prompt's last, partly filled page."""
    before = (slice(None),) * LAYOUTS[pages.backend][0].index("pages")
    return _pinned(
        pages, *(x.at[(*before, target_W)].set(x[(*before, source_W)]) for x in (pages.k, pages.v))
    )


def _finite(x: Array) -> Array:
    """Return x with zeros for values that are not finite.

    Masked positions are multiplied by zero, so a NaN would otherwise spread to the next sequence that gets
    the page."""
    return jnp.where(jnp.isfinite(x), x, 0)


def _pinned(pages: Pages, k: Array, v: Array) -> Pages:
    """Keep the sharding of the input, so that the next call does not compile another program."""
    keys, values = LAYOUTS[pages.backend]
    return Pages(constrain(k, keys), constrain(v, values), pages.backend)
