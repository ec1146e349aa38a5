"""Qwen3's mixtures of experts: Qwen3 with a router and experts in place of the MLP of most or all layers."""

from __future__ import annotations

from typing import Any

from ..config import Experts, ModelConfig, UnsupportedModelError
from . import llama, qwen2, qwen3
from .options import flag, whole
from .windows import window_of_all_layers

_EXPERT = "model.layers.{layer}.mlp.experts.{expert}."
TENSORS = qwen3.TENSORS | {
    "layers.router.weight": "model.layers.{layer}.mlp.gate.weight",
    "layers.expert_gate.weight": _EXPERT + "gate_proj.weight",
    "layers.expert_up.weight": _EXPERT + "up_proj.weight",
    "layers.expert_down.weight": _EXPERT + "down_proj.weight",
}

DEFAULTS = llama.DEFAULTS | {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32_768,
    "eos_token_id": None,
}


def read(hf: dict[str, Any]) -> ModelConfig:
    """Convert a Qwen3-MoE config.json. Windows, if `use_sliding_window` is true, are in all layers."""
    qwen2.refuse_mlp_bias(hf)
    num_layers = whole(hf, "num_hidden_layers", DEFAULTS["num_hidden_layers"])
    # transformers has both names for it
    count = whole(hf, "num_experts" if "num_experts" in hf else "num_local_experts", 128)
    experts = Experts(
        whole(hf, "hidden_size", DEFAULTS["hidden_size"]),
        whole(hf, "moe_intermediate_size", 768),
        count,
        whole(hf, "num_experts_per_tok", 8),
        flag(hf, "norm_topk_prob"),
    )
    if experts.chosen > count:
        raise UnsupportedModelError(f"num_experts_per_tok is {experts.chosen}, of {count} experts")
    dense, step = hf.get("mlp_only_layers") or [], whole(hf, "decoder_sparse_step", 1)
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise UnsupportedModelError(f"mlp_only_layers is {dense!r}; it must be a list of layers")
    return llama.read_common(
        {key: value for key, value in hf.items() if key not in ("num_experts", "num_local_experts")},
        DEFAULTS,
        family="qwen3_moe",
        qk_norm=True,
        biased=llama.ATTENTION if flag(hf, "attention_bias") else (),
        windows=window_of_all_layers(hf, 4096) if flag(hf, "use_sliding_window") else (),
        experts=[
            experts if layer not in dense and (layer + 1) % step == 0 else None for layer in range(num_layers)
        ],
    )
