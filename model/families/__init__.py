"""Model families. Each is a reader of Hugging Face configs and a table of parameter names, and nothing else.

A family module has `read(hf: dict) -> ModelConfig` and `TENSORS: dict[str, str]`, from the name of a
parameter ("layers.q_proj.weight", in whatever stack) to the Hugging Face tensor name, with `{layer}` where
there is one per layer and `{expert}` where there is one per expert. Biases are named after their weights,
unless they are in the table. Parameters with the same tensor lie in it one after the other, or number by
number if the tensor is in the family's `INTERLEAVED`. Matrices are [out, in] in the files, unless their
tensors are in its `UNTRANSPOSED`. `QUANTIZED` lists the quantisation methods whose files are read.

Files may differ from the table: names may begin with one of the family's `PREFIXES` instead of `model.`, and
the experts may lie as in its table `STACKED`. `NESTED` says that transformers has no class for the text half
alone of such files: its modules are below `model.language_model`. Other tensors whose names begin as in
`COPIED` belong to the model too, but not to what is computed here: they are copied on export.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import prod
from types import ModuleType
from typing import Any, NamedTuple

from ..config import Layer, ModelConfig, Site, Stack
from . import (
    deepseek_v3,
    gemma3,
    gpt_oss,
    kimi_k25,
    llama,
    mistral,
    nemotron_h,
    nemotron_h_omni,
    phi3,
    qwen2,
    qwen3,
    qwen3_5,
    qwen3_5_moe,
    qwen3_moe,
    qwen3_vl,
    qwen3_vl_moe,
)

FAMILIES: dict[str, ModuleType] = {
    "deepseek_v3": deepseek_v3,
    "gemma3": gemma3,
    "gemma3_text": gemma3,
    "gpt_oss": gpt_oss,
    "kimi_k2": deepseek_v3,
    "kimi_k25": kimi_k25,
    "llama": llama,
    "mistral": mistral,
    "nemotron_h": nemotron_h,
    "nemotron_h_omni": nemotron_h_omni,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_5": qwen3_5,
    "qwen3_5_moe": qwen3_5_moe,
    "qwen3_5_moe_text": qwen3_5_moe,
    "qwen3_5_text": qwen3_5,
    "qwen3_moe": qwen3_moe,
    "qwen3_vl": qwen3_vl,
    "qwen3_vl_moe": qwen3_vl_moe,
    "qwen3_vl_moe_text": qwen3_vl_moe,
    "qwen3_vl_text": qwen3_vl,
}
"""Family modules by config.json's model_type."""


PREFIX = "model."


class Parameter(NamedTuple):
    """One of our arrays, and its tensors in the model's files.

    `path` is its dotted path in the base's tree. `name` is the name of its tensors, with `{layer}` if it is
    stacked over `layers`, and `{expert}` if each of the `experts` has a tensor of its own; otherwise a tensor
    has an axis for the experts. `shape` is what one tensor holds of it, in our orientation. A `transposed`
    one is [out, in] in the files and [in, out] here. Files may hold several parameters side by side in one
    tensor: `part` is the place of this one on the tensor's last axis, which has `whole` numbers.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    transposed: bool = False
    layers: range | None = None
    experts: int | None = None
    part: tuple[int, int, int] | None = None  # start, stop, step
    whole: int = 0

    @property
    def is_by_expert(self) -> bool:
        return "{expert}" in self.name

    @property
    def file_shape(self) -> tuple[int, ...]:
        shape = self.shape if self.part is None else (*self.shape[:-1], self.whole)
        return (*shape[:-2], *shape[-2:][::-1]) if self.transposed else shape

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the name of each of its tensors, and the tensor's index on the stacked axes."""
        for at, layer in enumerate(() if self.layers is None else self.layers):
            if self.is_by_expert:
                for expert in range(self.experts or 0):
                    yield self.name.format(layer=layer, expert=expert), (at, expert)
            else:
                yield self.name.format(layer=layer), (at,)
        if self.layers is None:
            yield self.name, ()

    def taken(self, tensor: Any) -> Any:
        """Return a view of this parameter in a tensor of the files, in our orientation."""
        tensor = tensor.swapaxes(-1, -2) if self.transposed else tensor
        return self.place(tensor)

    def place(self, whole: Any) -> Any:
        """Return this parameter's part of a tensor that is in our orientation."""
        return whole if self.part is None else whole[..., slice(*self.part)]


@lru_cache(maxsize=64)
def parameters(config: ModelConfig) -> tuple[Parameter, ...]:
    """List the parameters of a model. Those that share tensors follow one another."""
    V, D = config.vocab_size, config.hidden_size
    names = FAMILIES[config.family].TENSORS

    def outer(path: str, shape: tuple[int, ...], transposed: bool = False) -> Parameter:
        return Parameter(path, names[path], shape, transposed)

    found = [outer("embed_tokens.weight", (V, D))]
    for stack in config.all_stacks:
        found += _of_stack(config, stack)
    found.append(outer("norm.weight", (D,)))
    if not config.tie_embeddings:
        found.append(outer("lm_head.weight", (D, V), transposed=True))
    return tuple(each._replace(name=in_files(config, each.name)) for each in found)


def in_files(config: ModelConfig, name: str) -> str:
    """Return the name that the tensor of a family's table has in the model's files."""
    if name.startswith(PREFIX):
        return config.prefix + name.removeprefix(PREFIX)
    # The head lies beside the part that is called `model`, or `backbone`.
    parents = config.prefix.split(".")[:-1]
    return ".".join([*parents[:-1], name]) if parents[-1] in ("model", "backbone") else name


def is_nested(config: ModelConfig) -> bool:
    """Return whether the decoder's modules are below `model.language_model` in transformers, not `model`."""
    return config.prefix != PREFIX and getattr(FAMILIES[config.family], "NESTED", False)


def _of_stack(config: ModelConfig, stack: Stack) -> list[Parameter]:
    family = FAMILIES[config.family]
    names = family.TENSORS | (family.STACKED if config.stacked_experts else {})
    by_tensor: dict[str, list[Parameter]] = {}
    for name, shape, experts in _of_layer(stack.layer):
        theirs = _tensor_name(names, f"layers.{name}")
        is_matrix = name.endswith(".weight") and len(shape) > 1
        shape = shape if experts is None or "{expert}" in theirs else (experts, *shape)
        in_out = theirs in getattr(family, "UNTRANSPOSED", ()) or (experts and config.stacked_in_out)
        transposed = is_matrix and not in_out
        each = Parameter(stack.path(name), theirs, shape, transposed, stack.layers, experts)
        by_tensor.setdefault(theirs, []).append(each)
    interleaved = getattr(family, "INTERLEAVED", ())
    return [
        each for theirs, listed in by_tensor.items() for each in _side_by_side(listed, theirs in interleaved)
    ]


def _side_by_side(listed: list[Parameter], interleaved: bool) -> Iterator[Parameter]:
    """Give the parameters of one tensor their places in it: one after the other, or number by number."""
    if len(listed) == 1:
        yield listed[0]
        return
    whole, first = sum(each.shape[-1] for each in listed), 0
    for number, each in enumerate(listed):
        place = (first, first + each.shape[-1], 1)
        first += each.shape[-1]
        yield each._replace(part=(number, whole, len(listed)) if interleaved else place, whole=whole)


def _tensor_name(names: dict[str, str], ours: str) -> str:
    if ours in names:
        return names[ours]
    return names[ours.removesuffix("bias") + "weight"].removesuffix("weight") + "bias"


def _of_layer(layer: Layer) -> Iterator[tuple[str, tuple[int, ...], int | None]]:
    """Yield the name of each parameter of a layer, its shape, and the number of experts that have one."""
    for norm in layer.norms:
        yield f"{norm.name}.weight", (norm.size,), None
    for vector in layer.vectors:
        yield f"{vector.name}.weight", vector.shape, None
    for site in layer.sites:
        yield f"{site.name}.weight", (site.into, site.out), site.experts
        if site.bias:
            yield f"{site.name}.bias", (site.out,), site.experts


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Map the Hugging Face names of this model's tensors to their shapes in the files."""
    return {name: each.file_shape for each in parameters(config) for name, _ in each.tensors()}


def parameter_count(config: ModelConfig) -> int:
    return sum(map(prod, tensor_shapes(config).values()))


def adapter_modules(config: ModelConfig) -> dict[str, frozenset[str]]:
    """Return the last parts of the names of the modules that an adapter may have, by part: attn, mlp."""
    found: dict[str, set[str]] = {}
    for number, layer in enumerate(config.layers):
        for site in layer.sites:
            if site.part is not None:
                for module in (
                    module_name(config, f"layers.{site.name}.weight", number),
                    adapter_module(config, site, number),
                ):
                    found.setdefault(site.part, set()).add(module.rpartition(".")[2])
    return {part: frozenset(names) for part, names in found.items()}


def merged_modules(config: ModelConfig) -> frozenset[frozenset[str]]:
    """Return the groups of sibling modules that SGLang and vLLM merge into one matrix (`Site.merged`), by the
    last parts of their names. An adapter must have all modules of a group or none."""
    groups: dict[tuple[int, str], set[str]] = {}
    for number, layer in enumerate(config.layers):
        for site in layer.sites:
            if site.merged is not None:
                name = adapter_module(config, site, number).rpartition(".")[2]
                groups.setdefault((number, site.merged), set()).add(name)
    return frozenset(map(frozenset, groups.values()))


def adapter_module(config: ModelConfig, site: Site, layer: int) -> str:
    """Return the name that the adapter of a matrix has in files: its module's, or, for one of several
    matrices in a module, its own beside it (`in_proj_q`)."""
    module = module_name(config, f"layers.{site.name}.weight", layer)
    tensor = _tensor_of(config, site)
    sharing = [each for each in config.layers[layer].sites if _tensor_of(config, each) == tensor]
    if site.experts is None and len(sharing) > 1:
        return f"{module.rpartition('.')[0]}.{site.name}"
    return module


def _tensor_of(config: ModelConfig, site: Site) -> str:
    return FAMILIES[config.family].TENSORS[f"layers.{site.name}.weight"]


def module_name(config: ModelConfig, parameter: str, layer: int | None = None) -> str:
    """Return the Hugging Face name of the module that has this parameter: "lm_head.weight", or one of a layer
    as in `TENSORS`. It has `{expert}` for a parameter of experts."""
    name = FAMILIES[config.family].TENSORS[parameter].removesuffix(".weight")
    return name.format(layer=layer, expert="{expert}")
