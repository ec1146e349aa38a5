"""Model families: each a Hugging Face config reader and a table of parameter names, nothing else.

A family module has `read(hf: dict) -> ModelConfig` and `TENSORS: dict[str, str]`, from our parameter path
("layers.q_proj.weight") to the Hugging Face tensor name, with `{layer}` where there is one per layer.
"""

from __future__ import annotations

from types import ModuleType

from ..config import ModelConfig
from . import llama, qwen2, qwen3

FAMILIES: dict[str, ModuleType] = {"llama": llama, "qwen2": qwen2, "qwen3": qwen3}
"""By config.json's model_type."""


def tensor_names(config: ModelConfig) -> dict[str, str]:
    """Our dotted parameter path -> Hugging Face tensor name, of the parameters that this model has."""
    names = FAMILIES[config.family].TENSORS
    return {
        ours: hf for ours, hf in names.items() if not (config.tie_embeddings and ours == "lm_head.weight")
    }


def is_transposed(path: str) -> bool:
    """Linear weights are [out, in] in Hugging Face files and [in, out] here; `path` is one of ours."""
    return path.endswith("_proj.weight") or path == "lm_head.weight"
