"""Immutable weights of samplers, and stacks of the adapters in one device batch."""

from __future__ import annotations

import functools
import itertools
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ...model import lora
from ...model.config import ModelConfig
from ...model.cpu.weights import adapters_by_layer, stored_layers
from ..budget import Budget

PyTree = Any

_STACKS_KEPT = 4
_numbers = itertools.count()


@dataclass(frozen=True, eq=False)
class Weights:
    """The weights that a request samples from: base weights, shared or its own, and an adapter on them.

    `base_by_layer` is for decoding (on a CPU `model.cpu.weights`).
    """

    base: PyTree
    base_by_layer: PyTree
    adapter: PyTree | None = None
    scale: float = 1.0
    id: int = field(default_factory=lambda: next(_numbers))

    @functools.cached_property
    def base_for_prompts(self) -> PyTree:
        """The base weights as `prefill` takes them."""
        return stored_layers(self.base)

    @property
    def own(self) -> PyTree:
        """The arrays that are not the shared base's: the adapter, or else the base weights."""
        return self.base if self.adapter is None else self.adapter

    @property
    def adapter_bytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.adapter))


class AdapterStack(NamedTuple):
    """The adapters of a batch, stacked (`lora.stack_adapters`), also in decoding's layout; empty without
    adapters."""

    stacked: PyTree | None = None
    by_layer: PyTree | None = None


class AdapterStacks:
    """A stack for the adapters of a batch, with the last few results kept within the budget.

    The stack in use stays, whatever its size. The number of adapters is padded to a power of two, matrices
    and ranks to those of the widest adapter, with zeros, so that few programs are compiled. A single adapter
    keeps its own shape.
    """

    kind = "sampler_stacks"
    may_leave = True

    def __init__(self, config: ModelConfig, budget: Budget, sharding: Any = None, decoded_as: Any = None):
        """`decoded_as`, on an accelerator, is the dtype of the base (`lora.contained`)."""
        self._config = config
        self._budget = budget
        self._sharding = sharding
        self._decoded_as = decoded_as
        self._kept: OrderedDict[tuple[int, ...], AdapterStack] = OrderedDict()
        self._used: dict[tuple[int, ...], int] = {}
        budget.add(self)

    def of(self, batch: list[Weights]) -> tuple[AdapterStack, list[int]]:
        """Return the stack for the rows' weights, and each row's index in it; zeros without any adapter."""
        distinct = sorted({weights.id: weights for weights in batch}.values(), key=lambda w: w.id)
        index = {weights.id: i for i, weights in enumerate(distinct)}
        if all(weights.adapter is None for weights in distinct):
            return AdapterStack(), [0] * len(batch)
        key = tuple(index)
        if key not in self._kept:
            # Make room first, so that the old stacks and the new one are not on the device at once.
            size = sum(weights.adapter_bytes for weights in distinct)
            while len(self._kept) >= _STACKS_KEPT:
                self.drop_oldest()
            self._budget.make_room(size)
            self._kept[key] = self._stack(distinct)
        self._kept.move_to_end(key)
        self._used[key] = self._budget.now()
        return self._kept[key], [index[weights.id] for weights in batch]

    @property
    def bytes(self) -> int:
        """The bytes of the stacks that are kept."""
        arrays = {id(leaf): leaf for stack in self._kept.values() for leaf in jax.tree.leaves(stack)}
        return sum(leaf.nbytes for leaf in arrays.values())

    @property
    def oldest(self) -> int | None:
        return self._used[next(iter(self._kept))] if self._kept else None

    def drop_oldest(self) -> None:
        self._drop(next(iter(self._kept)))

    def forget(self, weights: Weights) -> None:
        """Free the stacks that hold `weights`."""
        for key in [key for key in self._kept if weights.id in key]:
            self._drop(key)

    def _drop(self, key: tuple[int, ...]) -> None:
        del self._kept[key]
        self._used.pop(key, None)

    def _stack(self, distinct: list[Weights]) -> AdapterStack:
        adapters: list[Any] = [weights.adapter for weights in distinct]
        scales = [weights.scale for weights in distinct]
        if len(adapters) > 1:
            template = _widest([adapter for adapter in adapters if adapter is not None])
            adapters = [_padded(adapter, template) for adapter in adapters]
            missing = (1 << (len(adapters) - 1).bit_length()) - len(adapters)
            adapters += [_padded(None, template)] * missing
            scales += [0.0] * missing
        stack = lora.stack_adapters(tuple(adapters), jnp.asarray(scales, jnp.float32))
        if self._sharding is not None:
            stack = jax.device_put(stack, self._sharding)
        if self._decoded_as is not None:
            return AdapterStack(stack, lora.contained(stack, self._decoded_as))
        return AdapterStack(stack, adapters_by_layer(stack, self._config))


def _widest(adapters: list[PyTree]) -> PyTree:
    """Return shapes that have room for every one of `adapters`."""
    shapes: dict[tuple, tuple[int, ...]] = {}
    for adapter in adapters:
        for path, leaf in jax.tree_util.tree_leaves_with_path(adapter):
            shapes[path] = tuple(np.maximum(shapes.get(path, leaf.shape), leaf.shape).tolist())
    # all matrices of one batch get one rank
    rank = max(shape[-1] for path, shape in shapes.items() if path[-1].key == "a")
    template: PyTree = {"layers": {}}
    for path, shape in shapes.items():
        shape = (*shape[:-1], rank) if path[-1].key == "a" else (*shape[:-2], rank, shape[-1])
        place = template
        for part in path[:-1]:
            place = place.setdefault(part.key, {})
        place[path[-1].key] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return template


def _padded(adapter: PyTree | None, template: PyTree) -> PyTree:
    """Return `adapter` in the template's shapes, with zeros where it has nothing (None: everywhere)."""
    if isinstance(template, dict):
        return {name: _padded((adapter or {}).get(name), part) for name, part in template.items()}
    if adapter is None:
        return jnp.zeros(template.shape, template.dtype)
    return jnp.pad(
        adapter, [(0, want - has) for want, has in zip(template.shape, adapter.shape, strict=True)]
    )
