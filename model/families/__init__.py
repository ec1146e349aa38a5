"""Model families. Each is a reader of Hugging Face configs and a table of parameter names, and nothing else.

A family module has `read(hf: dict) -> ModelConfig` and `TENSORS: dict[str, str]`, from the name of a
parameter ("layers.q_proj.weight", in whatever stack) to the Hugging Face tensor name, with `{layer}` where
there is one per layer. Biases are named after their weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import prod
from types import ModuleType
from typing import NamedTuple

from ..config import Layer, ModelConfig
from . import llama, mistral, qwen2, qwen3, qwen3_moe

FAMILIES: dict[str, ModuleType] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
}
"""Family modules by config.json's model_type."""


class Parameter(NamedTuple):
    """One of our arrays, and its tensors in the model's files.

    `path` is its dotted path in the base's tree. `name` is the name of its tensors, with `{layer}` if it is
    stacked over `layers`, and `{expert}` if it is also stacked over `experts`. `shape` is that of one tensor.
    A `transposed` one is [out, in] in the files and [in, out] here.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    transposed: bool = False
    layers: range | None = None
    experts: int | None = None

    @property
    def file_shape(self) -> tuple[int, ...]:
        return self.shape[::-1] if self.transposed else self.shape

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the name of each of its tensors, and the tensor's index on the stacked axes."""
        for at, layer in enumerate(() if self.layers is None else self.layers):
            for expert in () if self.experts is None else range(self.experts):
                yield self.name.format(layer=layer, expert=expert), (at, expert)
            if self.experts is None:
                yield self.name.format(layer=layer), (at,)
        if self.layers is None:
            yield self.name, ()


@lru_cache(maxsize=64)
def parameters(config: ModelConfig) -> tuple[Parameter, ...]:
    """List the parameters of a model."""
    V, D = config.vocab_size, config.hidden_size
    names = FAMILIES[config.family].TENSORS

    def outer(path: str, shape: tuple[int, ...], transposed: bool = False) -> Parameter:
        return Parameter(path, names[path], shape, transposed)

    found = [outer("embed_tokens.weight", (V, D))]
    for stack in config.all_stacks:
        for name, shape, transposed, experts in _of_layer(stack.layer):
            weight = names[f"layers.{name.removesuffix('bias').removesuffix('weight')}weight"]
            theirs = weight.removesuffix("weight") + "bias" if name.endswith(".bias") else weight
            found.append(Parameter(stack.path(name), theirs, shape, transposed, stack.layers, experts))
    found.append(outer("norm.weight", (D,)))
    if not config.tie_embeddings:
        found.append(outer("lm_head.weight", (D, V), transposed=True))
    return tuple(found)


def _of_layer(layer: Layer) -> Iterator[tuple[str, tuple[int, ...], bool, int | None]]:
    """Yield the name of each parameter of a layer, its shape, whether the files have it transposed, and the
    number of experts that have one."""
    for norm in layer.norms:
        yield f"{norm.name}.weight", (norm.size,), False, None
    for site in layer.sites:
        yield f"{site.name}.weight", (site.into, site.out), True, site.experts
        if site.bias:
            yield f"{site.name}.bias", (site.out,), False, site.experts


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Map the Hugging Face names of this model's tensors to their shapes in the files."""
    return {name: each.file_shape for each in parameters(config) for name, _ in each.tensors()}


def parameter_count(config: ModelConfig) -> int:
    return sum(map(prod, tensor_shapes(config).values()))


def module_name(config: ModelConfig, parameter: str, layer: int | None = None) -> str:
    """Return the Hugging Face name of the module that has this parameter: "lm_head.weight", or one of a layer
    as in `TENSORS`. It has `{expert}` for a parameter of experts."""
    name = FAMILIES[config.family].TENSORS[parameter].removesuffix(".weight")
    return name.format(layer=layer, expert="{expert}")
