"""Qwen2 and Qwen2.5: Llama with biases on q, k and v."""

from __future__ import annotations

from ..config import ModelConfig
from . import llama

TENSORS = llama.TENSORS | {
    f"layers.{name}.bias": f"model.layers.{{layer}}.self_attn.{name}.bias"
    for name in ("q_proj", "k_proj", "v_proj")
}


def read(hf: dict) -> ModelConfig:
    """A Qwen2 config.json as our config."""
    return llama.read_common(hf, family="qwen2", attention_bias=True)
