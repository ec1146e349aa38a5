"""Qwen3 (dense): Llama with an RMSNorm on each head of q and k, a separate head size, and sliding windows."""

from __future__ import annotations

from typing import Any

from ..config import ModelConfig
from . import llama, qwen2
from .options import flag
from .windows import read_windows

TENSORS = llama.TENSORS | {
    f"layers.{name}.weight": f"model.layers.{{layer}}.self_attn.{name}.weight"
    for name in ("q_norm", "k_norm")
}

DEFAULTS = qwen2.DEFAULTS | {"head_dim": 128}


def read(hf: dict[str, Any]) -> ModelConfig:
    """Convert a Qwen3 config.json."""
    qwen2.refuse_mlp_bias(hf)
    if hf.get("head_dim", 0) is None:
        hf = {key: value for key, value in hf.items() if key != "head_dim"}
    biased = llama.ATTENTION if flag(hf, "attention_bias") else ()
    return llama.read_common(
        hf, DEFAULTS, family="qwen3", qk_norm=True, biased=biased, windows=read_windows(hf)
    )
