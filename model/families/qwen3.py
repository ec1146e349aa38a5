"""Qwen3 (dense): Llama with an RMSNorm on each head of q and k, and a head size of its own."""

from __future__ import annotations

from ..config import ModelConfig
from . import llama

TENSORS = llama.TENSORS | {
    f"layers.{name}.weight": f"model.layers.{{layer}}.self_attn.{name}.weight"
    for name in ("q_norm", "k_norm")
}


def read(hf: dict) -> ModelConfig:
    """A Qwen3 config.json as our config."""
    head_dim = hf.get("head_dim") or 128  # transformers' default, where the file leaves it out
    return llama.read_common(hf, family="qwen3", qk_norm=True, head_dim=head_dim)
