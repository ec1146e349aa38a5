"""Model families. Each is a reader of Hugging Face configs and a table of parameter names, and nothing else.

A family module has `read(hf: dict) -> ModelConfig` and `TENSORS: dict[str, str]`, from our parameter path
("layers.q_proj.weight") to the Hugging Face tensor name, with `{layer}` where there is one per layer.
Biases are named after their weights.
"""

from __future__ import annotations

from math import prod
from types import ModuleType

from ..config import ModelConfig
from . import llama, qwen2, qwen3

FAMILIES: dict[str, ModuleType] = {"llama": llama, "qwen2": qwen2, "qwen3": qwen3}
"""Family modules by config.json's model_type."""


def tensor_names(config: ModelConfig) -> dict[str, str]:
    """Map our dotted parameter paths to Hugging Face tensor names, for the parameters that this model has."""
    names = dict(FAMILIES[config.family].TENSORS)
    for linear in config.biased:
        weight = names[f"layers.{linear}.weight"]
        names[f"layers.{linear}.bias"] = weight.removesuffix("weight") + "bias"
    if config.tie_embeddings:
        del names["lm_head.weight"]
    return names


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Map the Hugging Face names of this model's tensors, in all layers, to their shapes in the files."""
    shapes: dict[str, tuple[int, ...]] = {}
    for ours, theirs in tensor_names(config).items():
        for layer in range(config.num_layers) if "{layer}" in theirs else (0,):
            shapes[theirs.format(layer=layer)] = _shape(config, ours)
    return shapes


def parameter_count(config: ModelConfig) -> int:
    return sum(map(prod, tensor_shapes(config).values()))


def _shape(config: ModelConfig, ours: str) -> tuple[int, ...]:
    name, _, kind = ours.removeprefix("layers.").rpartition(".")
    if name in config.linears:
        into, out = config.linears[name]
        return (out,) if kind == "bias" else (out, into)
    if name in ("embed_tokens", "lm_head"):
        return config.vocab_size, config.hidden_size
    return (config.head_dim,) if name in ("q_norm", "k_norm") else (config.hidden_size,)


def is_transposed(path: str) -> bool:
    """Return whether our `path` is a linear weight, which is [out, in] in the files and [in, out] here."""
    return path.endswith("_proj.weight") or path == "lm_head.weight"
