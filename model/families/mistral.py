"""Mistral 7B, Nemo, Small and others with model_type `mistral`: Llama with a sliding window in all layers.

config.json has no `use_sliding_window`: the window is there whenever `sliding_window` is not null.
"""

from __future__ import annotations

from typing import Any

from ..config import ModelConfig
from . import llama
from .qwen2 import refuse_mlp_bias
from .windows import window_of_all_layers

TENSORS = llama.TENSORS

DEFAULTS = llama.DEFAULTS | {
    "intermediate_size": 14_336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
}


def read(hf: dict[str, Any]) -> ModelConfig:
    """Convert a Mistral config.json."""
    refuse_mlp_bias(hf)
    windows = window_of_all_layers(hf, if_absent=4096)
    return llama.read_common(hf, DEFAULTS, family="mistral", windows=windows)
