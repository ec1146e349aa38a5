"""Base weights and adapters laid out for decoding, a few rows at a time, on one CPU device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from .decoder import Base, Block, Decoder, Linear, unembed
from .lora import LoraStack

PyTree = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BaseByLayer:
    """A base with "layers" as one tree per layer. With `by_output` the matrices of its linears and its head
    are [out, in]: those a CPU's kernels read as they lie, and in two bytes where they have two."""

    rest: Base
    layers: tuple[Base, ...]
    by_output: bool = field(metadata={"static": True})


def base_by_layer(base: Base, by_output: bool = False) -> Base | BaseByLayer:
    """`base` as `decode` likes it best; on anything but one CPU device, `base` itself.

    Layers are views of the stacked arrays, so that a decode step reads each weight where it lies: cutting
    layers out of a stack inside a program copies them. With `by_output` the matrices are copies.
    """
    if not _is_on_one_cpu(base["layers"]):
        return base
    rest = {name: part for name, part in base.items() if name != "layers"}
    if by_output and "lm_head" in rest:
        rest["lm_head"] = {"weight": rest["lm_head"]["weight"].T}
    return BaseByLayer(rest, _by_layer(base["layers"], by_output), by_output)


def adapters_by_layer(stack: LoraStack) -> LoraStack:
    """`stack` with "layers" as views, one tree per layer; on anything but one CPU device, `stack` itself."""
    if not _is_on_one_cpu(stack["layers"]):
        return stack
    return stack | {"layers": _by_layer(stack["layers"])}


def _is_on_one_cpu(layers: PyTree) -> bool:
    leaves = jax.tree.leaves(layers)
    return all(len(leaf.devices()) == 1 and leaf.device.platform == "cpu" for leaf in leaves)


def _by_layer(layers: PyTree, by_output: bool = False) -> tuple[PyTree, ...]:
    leaves = jax.tree.leaves(layers)
    if not leaves:
        return ()
    device = leaves[0].device

    def put(w: np.ndarray) -> Array:
        if by_output and w.ndim == 2:
            return jax.device_put(np.ascontiguousarray(w.T), device)
        return jax.device_put(w, device, may_alias=True)

    stacked = jax.tree.map(np.asarray, layers)
    return tuple(jax.tree.map(lambda w, at=layer: put(w[at]), stacked) for layer in range(len(leaves[0])))


class OpenLayers(NamedTuple):
    """A decoder's modules one by one, inside a traced function. `model`'s own blocks are not to be used.

    `wide` is what adapters are computed in."""

    model: Decoder
    blocks: list[Block]
    head_VD: Float[Array, "V D"]
    wide: Any


def open_layers(graph: nnx.GraphDef, base: Base | BaseByLayer) -> OpenLayers:
    """The decoder of `base`, which may come from `base_by_layer`."""
    if not isinstance(base, BaseByLayer):
        base = BaseByLayer(base, open_stack(base["layers"]), by_output=False)
    models = [nnx.merge(graph, base.rest | {"layers": layer}) for layer in base.layers]
    model, blocks = models[0], [model.layers for model in models]
    if not base.by_output:
        return OpenLayers(model, blocks, unembed(base.rest), model.norm.weight.dtype)
    for block in blocks:
        for part in vars(block).values():
            if isinstance(part, Linear):
                part.by_output = True
    head = base.rest["embed_tokens" if model.lm_head is None else "lm_head"]["weight"]
    return OpenLayers(model, blocks, head, jnp.float32)


def open_stack(layers: PyTree) -> tuple[PyTree, ...]:
    """One tree per layer of what is stacked on a leading axis, or already one tree per layer."""
    if isinstance(layers, tuple):
        return layers
    num_layers = len(jax.tree.leaves(layers)[0])
    return tuple(jax.tree.map(lambda w, at=layer: w[at], layers) for layer in range(num_layers))
