"""Qwen3.5's mixtures of experts: Qwen3.5 with a router, experts, and an expert that is shared, with a gate.

The files of the hub hold the experts of a layer in one tensor; those that transformers writes have a tensor
for each. Both are read, and exports have the layout that the model's own files have.
"""

from __future__ import annotations

from typing import Any

from ..config import Experts, ModelConfig, UnsupportedModelError
from . import qwen3_5, qwen3_moe
from .options import whole
from .qwen3_5 import COPIED, PREFIXES, UNTRANSPOSED
from .text_half import text_half

__all__ = ["COPIED", "DEFAULTS", "PREFIXES", "STACKED", "TENSORS", "UNTRANSPOSED", "read"]

_MLP = "model.layers.{layer}.mlp."
TENSORS = {name: theirs for name, theirs in qwen3_5.TENSORS.items() if ".mlp." not in theirs} | {
    name: theirs
    for name, theirs in qwen3_moe.TENSORS.items()
    if ".mlp." in theirs and "_proj.weight" not in name
}
TENSORS |= {
    "layers.shared_gate.weight": _MLP + "shared_expert.gate_proj.weight",
    "layers.shared_up.weight": _MLP + "shared_expert.up_proj.weight",
    "layers.shared_down.weight": _MLP + "shared_expert.down_proj.weight",
    "layers.shared_expert_gate.weight": _MLP + "shared_expert_gate.weight",
}
STACKED = {
    "layers.expert_gate.weight": _MLP + "experts.gate_up_proj",
    "layers.expert_up.weight": _MLP + "experts.gate_up_proj",
    "layers.expert_down.weight": _MLP + "experts.down_proj",
}

DEFAULTS = qwen3_5.DEFAULTS | {"hidden_size": 2048, "num_hidden_layers": 40, "num_key_value_heads": 2}


def read(hf: dict[str, Any]) -> ModelConfig:
    """Convert a Qwen3.5-MoE config.json, of the text half alone or with a `text_config`."""
    hf = text_half(hf)
    # transformers has both names for it
    count = whole(hf, "num_experts" if "num_experts" in hf else "num_local_experts", 256)
    experts = Experts(
        whole(hf, "hidden_size", DEFAULTS["hidden_size"]),
        whole(hf, "moe_intermediate_size", 512),
        count,
        whole(hf, "num_experts_per_tok", 8),
        normalised=True,
        shared=whole(hf, "shared_expert_intermediate_size", 512),
        shared_gated=True,
    )
    if experts.chosen > count:
        raise UnsupportedModelError(f"num_experts_per_tok is {experts.chosen}, of {count} experts")
    shared = {key: value for key, value in hf.items() if key not in ("num_experts", "num_local_experts")}
    return qwen3_5.read_hybrid(shared, DEFAULTS, experts)
