"""Lays out base weights and adapters for decoding a few rows at a time on one CPU device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ..config import ModelConfig
from ..decoder import Base, Block, Decoder, build, unembed
from ..kernels.product import Form
from ..kernels.two_byte_floats import stored_view
from ..lora import LoraStack

PyTree = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BaseByLayer:
    """A base with "layers" as one tree per layer.

    `rest` holds its other parts; an embedding of two-byte floats is stored as integers
    (`kernels.two_byte_floats`).
    If the embedding is also the head, `tied_VD` holds it unchanged. With `by_output`, the matrices of the
    linears and the head are [out, in], which the CPU's kernels read without a conversion, also as two-byte
    floats."""

    rest: Base
    tied_VD: Array | None
    layers: tuple[Base, ...]
    graph: nnx.GraphDef = field(metadata={"static": True})
    config: ModelConfig = field(metadata={"static": True})
    by_output: bool = field(metadata={"static": True})

    @property
    def head(self) -> Float[Array, "V D"]:
        if self.tied_VD is not None:
            return self.tied_VD
        return self.rest["lm_head"]["weight"] if self.by_output else unembed(self.rest)


def base_by_layer(base: Base, config: ModelConfig, by_output: bool = False) -> Base | BaseByLayer:
    """Return `base` in the layout that is fastest for `decode`; on anything but one CPU device, `base`
    itself.

    Layers are views of the stacked arrays, so that a decode step reads each weight in place; cutting layers
    out of a stack inside a program would copy them. With `by_output` the matrices are copies.
    """
    if not _is_on_one_cpu(base["layers"]):
        return base
    rest = {name: part for name, part in base.items() if name != "layers"}
    table_VD = base["embed_tokens"]["weight"]
    rest["embed_tokens"] = {"weight": stored_view(table_VD)}
    tied_VD = None if "lm_head" in rest else table_VD
    if by_output and "lm_head" in rest:
        rest["lm_head"] = {"weight": rest["lm_head"]["weight"].T}
    layers = _by_layer(base["layers"], config, by_output)
    dtype = table_VD.dtype
    form = Form.BY_OUTPUT if by_output else Form.PLAIN
    graph, _ = build(config, dtype, form, dtype if dtype.itemsize == 2 else None)
    return BaseByLayer(rest, tied_VD, layers, graph, config, by_output)


def stored_layers(base: Base) -> Base:
    """Return a frozen `base` with the two-byte floats of its layers as integers, without a copy, if it is on
    one CPU device; otherwise `base`.

    From a stack of floats, XLA would make one of float32 before it runs the first layer of a scan. The
    matrices of experts, [L, E, in, out], stay as they are."""
    if not _is_on_one_cpu(base["layers"]):
        return base
    return base | {"layers": jax.tree.map(lambda w: stored_view(w) if w.ndim < 4 else w, base["layers"])}


def adapters_by_layer(stack: LoraStack, config: ModelConfig) -> LoraStack:
    """Return `stack` with "layers" as views, one tree per layer, if on one CPU device; otherwise `stack`."""
    if not _is_on_one_cpu(stack["layers"]):
        return stack
    return stack | {"layers": _by_layer(stack["layers"], config)}


def _is_on_one_cpu(layers: PyTree) -> bool:
    leaves = jax.tree.leaves(layers)
    return all(
        isinstance(leaf, jax.Array) and len(leaf.devices()) == 1 and leaf.device.platform == "cpu"
        for leaf in leaves
    )


def _by_layer(layers: PyTree, config: ModelConfig, by_output: bool = False) -> tuple[PyTree, ...]:
    leaves = jax.tree.leaves(layers)
    if not leaves:
        return ()
    device = leaves[0].device

    def put(w: np.ndarray) -> Array:
        if by_output and w.ndim == 2:
            return jax.device_put(np.ascontiguousarray(w.T), device)
        return jax.device_put(w, device, may_alias=True)

    by_layer = open_stack(jax.tree.map(np.asarray, layers), config)
    return tuple(jax.tree.map(put, layer) for layer in by_layer)


class OpenLayers(NamedTuple):
    """The modules of a decoder, one by one, inside a traced function. Do not use the blocks of `model`
    itself.

    `wide` is the dtype in which adapters are computed."""

    model: Decoder
    blocks: list[Block]
    head_VD: Float[Array, "V D"]
    wide: Any


def open_layers(graph: nnx.GraphDef, base: Base | BaseByLayer) -> OpenLayers:
    """Open the decoder of `base`, which may come from `base_by_layer` and then has a graph of its own."""
    if not isinstance(base, BaseByLayer):
        tied_VD = None if "lm_head" in base else base["embed_tokens"]["weight"]
        config = nnx.merge(graph, base).config
        layers = open_stack(base["layers"], config)
        base = BaseByLayer(base, tied_VD, layers, graph, config, by_output=False)
    one_each = {stack.key: base.layers[stack.layers[0]] for stack in base.config.all_stacks}
    model = nnx.merge(base.graph, base.rest | {"layers": one_each.get(None, one_each)})
    graphs = {stack.key: nnx.split(model.stack(stack))[0] for stack in base.config.all_stacks}
    places = zip(base.config.places, base.layers, strict=True)
    blocks = [nnx.merge(graphs[stack.key], layer) for (stack, _), layer in places]
    dtype = model.norm.weight.dtype
    return OpenLayers(model, blocks, base.head, jnp.float32 if base.by_output else dtype)


def open_stack(layers: PyTree, config: ModelConfig) -> tuple[PyTree, ...]:
    """Return one tree per layer, from trees stacked on a leading axis or from separate trees."""
    if isinstance(layers, tuple):
        return layers
    return tuple(jax.tree.map(lambda w, at=at: w[at], stack.of(layers)) for stack, at in config.places)
