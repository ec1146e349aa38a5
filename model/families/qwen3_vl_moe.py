"""The text half of Qwen3-VL's mixtures of experts: Qwen3-MoE under other names, with normalised weights.

The files of the hub hold a layer's experts in one tensor as [experts, in, out], those that transformers
writes as [experts, out, in].
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..config import ModelConfig, UnsupportedModelError
from . import qwen3_5_moe, qwen3_moe
from .qwen3_vl import COPIED, NESTED, PREFIXES, without_windows
from .text_half import text_half

__all__ = ["COPIED", "DEFAULTS", "NESTED", "PREFIXES", "STACKED", "TENSORS", "read"]

TENSORS = qwen3_moe.TENSORS
STACKED = qwen3_5_moe.STACKED

DEFAULTS = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 128_000,
    "moe_intermediate_size": 1408,
    "num_experts_per_tok": 4,
    "rope_theta": 500_000.0,
    "eos_token_id": None,
}


def read(hf: dict[str, Any]) -> ModelConfig:
    """Convert a Qwen3-VL-MoE config.json, of the text half alone or with a `text_config`."""
    hf = DEFAULTS | text_half(hf)
    if not hf.get("norm_topk_prob", True):
        raise UnsupportedModelError("norm_topk_prob false is not supported for qwen3_vl_moe")
    if not {"num_experts", "num_local_experts"} & hf.keys():
        hf["num_experts"] = 60
    hf = without_windows(hf) | {"norm_topk_prob": True}
    return replace(qwen3_moe.read(hf), family="qwen3_vl_moe")
