"""The sampler's cache: what its programs keep of sequences, for each kind of layer.

Layers with attention have keys and values in pages of a fixed number of positions. A table per sequence lists
its pages in order, for all layers alike. Sequences with a common prefix share pages, and memory is bounded
whatever the lengths are. Page 0 belongs to no sequence: padding writes there. One pair of arrays (`Pages`)
holds the pages of all layers whose heads have the same shape; its layout depends on the backend whose kernel
reads them (`kernels.paged_attention.pages`).

Axis letters: L layers of a kind, K kv heads, H head dim, V head dim of values, W tokens written at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from .config import KeysValues, ModelConfig
from .kernels import paged_attention
from .kernels.backends import Backend
from .kernels.paged_attention import cpu
from .kernels.paged_attention.pages import LAYOUTS, Pages
from .sharding import LogicalAxes, constrain, partition_spec


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """What is kept of all sequences, for each kind of layer (`ModelConfig.cache_kinds`)."""

    parts: tuple[Pages, ...]
    kinds: tuple[KeysValues, ...] = field(metadata={"static": True})
    backend: Backend = field(metadata={"static": True})
    page_size: int = field(metadata={"static": True})

    def of(self, kind: KeysValues) -> Pages:
        """Return what is kept for the layers of a kind."""
        return self.parts[self.kinds.index(kind)]

    def updated(self, kind: KeysValues, part: Pages) -> Cache:
        """Return the cache with a new part for the layers of a kind."""
        at = self.kinds.index(kind)
        return replace(self, parts=(*self.parts[:at], part, *self.parts[at + 1 :]))


def bytes_per_token(config: ModelConfig, dtype: Any) -> int:
    """Return the memory for the keys and values of one position in all layers."""
    return sum(layer.mixer.cached.per_token for layer in config.layers) * jnp.dtype(dtype).itemsize


def make_cache(
    config: ModelConfig,
    num_pages: int,
    page_size: int,
    dtype: Any,
    mesh: Mesh | None = None,
    backend: Backend = "cpu",
) -> Cache:
    """Make an empty cache. `num_pages` includes page 0, which belongs to no sequence."""

    def empty(shape: tuple[int, ...], axes: LogicalAxes) -> Array:
        sharding = None if mesh is None else NamedSharding(mesh, partition_spec(shape, axes, mesh))
        return jnp.zeros(shape, cpu.stored_dtype(dtype) if backend == "cpu" else dtype, device=sharding)

    def pages(kind: KeysValues) -> Pages:
        shapes = page_shapes(config, kind, num_pages, page_size, backend)
        keys, values = map(empty, shapes, LAYOUTS[backend])
        return Pages(keys, values, backend)

    return Cache(tuple(map(pages, config.cache_kinds)), config.cache_kinds, backend, page_size)


def page_shapes(
    config: ModelConfig, kind: KeysValues, num_pages: int, page_size: int, backend: Backend
) -> list[tuple[int, ...]]:
    """Return the shapes of the keys and the values of all layers of a kind."""
    sizes = {
        "layers": sum(layer.mixer.cached == kind for layer in config.layers),
        "pages": num_pages,
        "kv_heads": kind.heads,
        "cached_heads": kind.heads,
        "positions": page_size,
    }
    dims = kind.key_dim, kind.value_dim
    return [
        tuple((sizes | {"head_dim": dim})[axis] for axis in axes)
        for dim, axes in zip(dims, LAYOUTS[backend], strict=True)
    ]


def write(
    pages: Pages,
    k_WLKH: Float[Array, "W L K H"],
    v_WLKV: Float[Array, "W L K V"],
    page_W: Int[Array, " W"],
    offset_W: Int[Array, " W"],
) -> Pages:
    """Write the keys and values of W tokens, in all layers of a kind, at (page, offset). On a CPU only."""
    return _pinned(pages, *cpu.write(pages, _finite(k_WLKH), _finite(v_WLKV), page_W, offset_W))


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


@partial(jax.jit, donate_argnames="cache")
def copy_pages(cache: Cache, source_W: Int[Array, " W"], target_W: Int[Array, " W"]) -> Cache:
    """Copy whole pages. Each sample of a prompt gets a copy of the prompt's last, partly filled page."""
    before = (slice(None),) * LAYOUTS[cache.backend][0].index("pages")

    def copied(pages: Pages) -> Pages:
        new = (x.at[(*before, target_W)].set(x[(*before, source_W)]) for x in (pages.k, pages.v))
        return _pinned(pages, *new)

    return replace(cache, parts=tuple(map(copied, cache.parts)))


def _finite(x: Array) -> Array:
    """Return x with zeros for values that are not finite.

    Masked positions are multiplied by zero, so a NaN would otherwise spread to the next sequence that gets
    the page."""
    return jnp.where(jnp.isfinite(x), x, 0)


def _pinned(pages: Pages, k: Array, v: Array) -> Pages:
    """Keep the sharding of the input, so that the next call does not compile another program."""
    keys, values = LAYOUTS[pages.backend]
    return Pages(constrain(k, keys), constrain(v, values), pages.backend)
