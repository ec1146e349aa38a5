"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and sliding windows."""

from __future__ import annotations

from typing import Any

from ..config import ModelConfig, UnsupportedModelError
from . import llama
from .windows import read_windows

TENSORS = llama.TENSORS

DEFAULTS = llama.DEFAULTS | {
    "vocab_size": 151_936,
    "intermediate_size": 22_016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "eos_token_id": None,
}


def read(hf: dict[str, Any]) -> ModelConfig:
    """Convert a Qwen2 config.json."""
    refuse_mlp_bias(hf)
    # `attention_bias` has no effect here: q, k and v have biases, o has none
    biased = ("q_proj", "k_proj", "v_proj")
    return llama.read_common(hf, DEFAULTS, family="qwen2", biased=biased, windows=read_windows(hf))


def refuse_mlp_bias(hf: dict[str, Any]) -> None:
    if hf.get("mlp_bias"):
        raise UnsupportedModelError(f"mlp_bias is not supported for {hf['model_type']}")
