"""The sampler's cache: what its programs keep of sequences, for each kind of layer.

Layers with attention have keys and values in pages of a fixed number of positions. A table per sequence lists
its pages in order, for all layers alike. Sequences with a common prefix share pages, and memory is bounded
whatever the lengths are. Page 0 belongs to no sequence: padding writes there. One pair of arrays (`Pages`)
holds the pages of all layers whose heads have the same shape; its layout depends on the backend whose kernel
reads them (`kernels.paged_attention.pages`).

Mixtures of experts also keep the experts of every position in their layers, in pages under the same numbers,
so that the experts of a whole sequence can be read wherever its prefix came from. Delta nets and Mamba-2 have
one state per sequence, whatever its length, in numbered slots (`StateSlots`). Slot 0 belongs to no sequence.

Axis letters: L layers of a kind, M layers with experts, k experts of a token, K kv heads, H head dim, V head
dim of values, W tokens written at once, S sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int, Integer, UInt

from .config import CacheKind, KeysValues, ModelConfig, States
from .kernels import paged_attention
from .kernels.backends import Backend
from .kernels.paged_attention import cpu
from .kernels.paged_attention.pages import LAYOUTS, Pages
from .kernels.two_byte_floats import stored_dtype
from .sharding import LogicalAxes, constrain, partition_spec, replicated
from .states import State

_EXPERTS: LogicalAxes = ("pages", "positions", "layers", "hidden")

_MATRIX: LogicalAxes = ("layers", "pages", "heads", "hidden", "hidden", "hidden")
_TAIL: LogicalAxes = ("layers", "pages", "positions", "hidden")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StateSlots:
    """The states of sequences in float32, for all layers of a kind, by slot."""

    matrix: Any  # [L slots G R K V], or what JAX puts in its place in a tree
    tail: Any  # [L slots W C]

    def read(self, layer: Any, slot_S: Int[Array, " S"], is_new_S: Bool[Array, " S"] | None = None) -> State:
        """Return a layer's states of some slots; zeros for new sequences, whatever is in their slots."""
        found = State(self.matrix[layer, slot_S], self.tail[layer, slot_S])
        if is_new_S is None:
            return found
        return jax.tree.map(lambda x: jnp.where(is_new_S.reshape(-1, *(1,) * (x.ndim - 1)), 0, x), found)

    def written(self, layer: Any, slot_S: Int[Array, " S"], new: State) -> StateSlots:
        """Return the slots with new states of a layer, or, with `slice(None)`, of all layers [L S ...]."""
        return StateSlots(
            constrain(self.matrix.at[layer, slot_S].set(new.matrix), _MATRIX),
            constrain(self.tail.at[layer, slot_S].set(new.tail), _TAIL),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """The cached arrays of all sequences, for each kind of layer (`ModelConfig.cache_kinds`)."""

    parts: tuple[Pages | StateSlots, ...]
    kinds: tuple[CacheKind, ...] = field(metadata={"static": True})
    backend: Backend = field(metadata={"static": True})
    page_size: int = field(metadata={"static": True})
    experts: Any = None  # [pages positions M k] unsigned integers; None without layers with experts

    def pages(self, kind: KeysValues) -> Pages:
        """Return the pages of the layers of a kind."""
        part = self.parts[self.kinds.index(kind)]
        assert isinstance(part, Pages)
        return part

    def states(self, kind: States) -> StateSlots:
        """Return the states of the layers of a kind."""
        part = self.parts[self.kinds.index(kind)]
        assert isinstance(part, StateSlots)
        return part

    def updated(self, kind: CacheKind, part: Pages | StateSlots) -> Cache:
        """Return the cache with a new part for the layers of a kind."""
        at = self.kinds.index(kind)
        return replace(self, parts=(*self.parts[:at], part, *self.parts[at + 1 :]))


def bytes_per_token(config: ModelConfig, dtype: Any) -> int:
    """Return the memory for the keys and values of one position in all layers, and for its experts."""
    keys_values = sum(mixer.cached.per_token for mixer in config.mixers) * jnp.dtype(dtype).itemsize
    return keys_values + (0 if config.routing is None else _experts_bytes(*config.routing))


def _experts_bytes(layers: int, chosen: int, count: int) -> int:
    return layers * chosen * _experts_dtype(count).itemsize


def _experts_dtype(count: int) -> Any:
    return jnp.dtype(jnp.uint8 if count <= 1 << 8 else jnp.uint16)


def bytes_per_sequence(config: ModelConfig) -> int:
    """Return the memory for one sequence's states in all layers."""
    kinds = (mixer.cached for mixer in config.mixers)
    return 4 * sum(kind.per_sequence for kind in kinds if isinstance(kind, States))


def make_cache(
    config: ModelConfig,
    num_pages: int,
    page_size: int,
    dtype: Any,
    mesh: Mesh | None = None,
    backend: Backend = "cpu",
    num_slots: int = 1,
) -> Cache:
    """Make an empty cache. `num_pages` and `num_slots` include page 0 and slot 0, which are no sequence's."""

    def empty(shape: tuple[int, ...], axes: LogicalAxes, dtype: Any) -> Array:
        sharding = None if mesh is None else NamedSharding(mesh, partition_spec(shape, axes, mesh))
        return jnp.zeros(shape, dtype, device=sharding)

    def part(kind: CacheKind) -> Pages | StateSlots:
        if isinstance(kind, States):
            before = (_number_of(config, kind), num_slots)
            return StateSlots(
                empty((*before, *kind.matrix), _MATRIX, jnp.float32),
                empty((*before, *kind.tail), _TAIL, jnp.float32),
            )
        stored = stored_dtype(dtype) if backend == "cpu" else dtype
        shapes = page_shapes(config, kind, num_pages, page_size, backend)
        return Pages.of(map(partial(empty, dtype=stored), shapes, LAYOUTS[backend]), backend)

    experts = None
    if config.routing is not None:
        layers, chosen, count = config.routing
        sharding = None if mesh is None else replicated(mesh)
        shape = (num_pages, page_size, layers, chosen)
        experts = jnp.zeros(shape, _experts_dtype(count), device=sharding)
    return Cache(tuple(map(part, config.cache_kinds)), config.cache_kinds, backend, page_size, experts)


def _number_of(config: ModelConfig, kind: CacheKind) -> int:
    return sum(layer.cached == kind for layer in config.layers)


def page_shapes(
    config: ModelConfig, kind: KeysValues, num_pages: int, page_size: int, backend: Backend
) -> list[tuple[int, ...]]:
    """Return the shapes of the keys, and of values of their own, of all layers of a kind."""
    sizes = {
        "layers": _number_of(config, kind),
        "pages": num_pages,
        "kv_heads": kind.heads,
        "cached_heads": kind.heads,
        "positions": page_size,
    }
    return [
        tuple((sizes | {"head_dim": dim})[axis] for axis in axes)
        for dim, axes in zip(kind.stored_dims, LAYOUTS[backend], strict=False)
    ]


def write(
    pages: Pages,
    new: Sequence[Float[Array, "W L K _"]],
    page_W: Int[Array, " W"],
    offset_W: Int[Array, " W"],
) -> Pages:
    """Write the keys of W tokens, and their values if they are stored, in all layers of a kind, at (page,
    offset). On a CPU only."""
    return _pinned(pages, cpu.write(pages, [*map(_finite, new)], page_W, offset_W))


def write_layer(
    pages: Pages,
    layer: Int[Array, ""],
    k_WKH: Float[Array, "W K H"],
    v_WKH: Float[Array, "W K H"],
    page_W: Int[Array, " W"],
    offset_W: Int[Array, " W"],
) -> Pages:
    """Write one layer's keys of W tokens, and their values if they are stored, at (page, offset). Not on a
    CPU."""
    new = [_finite(x) for x, _ in zip((k_WKH, v_WKH), pages.stored, strict=False)]
    return _pinned(pages, paged_attention.write_layer(pages, layer, new, page_W, offset_W))


def with_experts(
    cache: Cache,
    chosen_MWk: Integer[Array, "M W k"] | None,
    page_W: Int[Array, " W"],
    offset_W: Int[Array, " W"],
) -> Cache:
    """Return the cache with the experts of W tokens at (page, offset); None without layers with experts."""
    if chosen_MWk is None:
        return cache
    chosen_WMk = chosen_MWk.swapaxes(0, 1).astype(cache.experts.dtype)
    experts = cache.experts.at[page_W, offset_W].set(chosen_WMk)
    return replace(cache, experts=constrain(experts, _EXPERTS))


@jax.jit
def experts_in(cache: Cache, page_W: Int[Array, " W"]) -> UInt[Array, "W Z M k"]:
    """Return the experts of all positions of pages."""
    return cache.experts[page_W]


@partial(jax.jit, donate_argnames="cache")
def copy_pages(cache: Cache, source_W: Int[Array, " W"], target_W: Int[Array, " W"]) -> Cache:
    """Copy whole pages. Each sample of a prompt gets a copy of the prompt's last, partly filled page."""
    before = (slice(None),) * LAYOUTS[cache.backend][0].index("pages")

    def copied(part: Pages | StateSlots) -> Pages | StateSlots:
        if isinstance(part, StateSlots):
            return part
        return _pinned(part, [x.at[(*before, target_W)].set(x[(*before, source_W)]) for x in part.stored])

    copies = replace(cache, parts=tuple(map(copied, cache.parts)))
    if cache.experts is None:
        return copies
    experts = cache.experts.at[target_W].set(cache.experts[source_W])
    return replace(copies, experts=constrain(experts, _EXPERTS))


@partial(jax.jit, donate_argnames="cache")
def copy_states(cache: Cache, source_W: Int[Array, " W"], target_W: Int[Array, " W"]) -> Cache:
    """Copy the states of slots to other slots. Each sample of a prompt gets a copy of the prompt's state."""

    def copied(part: Pages | StateSlots) -> Pages | StateSlots:
        if isinstance(part, Pages):
            return part
        every = slice(None)
        return part.written(every, target_W, part.read(every, source_W))

    return replace(cache, parts=tuple(map(copied, cache.parts)))


def _finite(x: Array) -> Array:
    """Return x with zeros for values that are not finite.

    Masked positions are multiplied by zero, so a NaN would otherwise spread to the next sequence that gets
    the page."""
    return jnp.where(jnp.isfinite(x), x, 0)


def _pinned(pages: Pages, stored: Sequence[Array]) -> Pages:
    """Keep the sharding of the input, so that the next call does not compile another program."""
    return Pages.of(map(constrain, stored, LAYOUTS[pages.backend]), pages.backend)
