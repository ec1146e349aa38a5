"""gpt-oss (arXiv:2508.10925): attention with sinks, windows in every other layer, and mixtures of experts.

The experts' matrices are stacked in the files, [experts, in, out], with gate and up number by number in one.
They may be in MXFP4 (`mxfp4.py`), and are then computed with in the server's dtype.
"""

from __future__ import annotations

from typing import Any

from ..config import Clamp, Experts, ModelConfig, UnsupportedModelError
from . import llama
from .options import flag, number, whole
from .windows import FULL, SLIDING, windows_of_layer_types

_EXPERTS = "model.layers.{layer}.mlp.experts."
TENSORS = {name: theirs for name, theirs in llama.TENSORS.items() if ".mlp." not in theirs} | {
    "layers.sinks.weight": "model.layers.{layer}.self_attn.sinks",
    "layers.router.weight": "model.layers.{layer}.mlp.router.weight",
    "layers.expert_gate.weight": _EXPERTS + "gate_up_proj",
    "layers.expert_up.weight": _EXPERTS + "gate_up_proj",
    "layers.expert_down.weight": _EXPERTS + "down_proj",
    "layers.expert_gate.bias": _EXPERTS + "gate_up_proj_bias",
    "layers.expert_up.bias": _EXPERTS + "gate_up_proj_bias",
    "layers.expert_down.bias": _EXPERTS + "down_proj_bias",
}
INTERLEAVED = {_EXPERTS + "gate_up_proj", _EXPERTS + "gate_up_proj_bias"}
QUANTIZED = ("mxfp4",)
UNTRANSPOSED = {_EXPERTS + "gate_up_proj", _EXPERTS + "down_proj"}

DEFAULTS = llama.DEFAULTS | {
    "vocab_size": 201_088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131_072,
    "eos_token_id": None,
    "rms_norm_eps": 1e-5,
}
_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def read(hf: dict[str, Any]) -> ModelConfig:
    """Convert a gpt-oss config.json. Without `layer_types`, the first of two layers has the window."""
    num_layers = whole(hf, "num_hidden_layers", DEFAULTS["num_hidden_layers"])
    # transformers has both names for it
    count = whole(hf, "num_experts" if "num_experts" in hf else "num_local_experts", 128)
    experts = Experts(
        whole(hf, "hidden_size", DEFAULTS["hidden_size"]),
        whole(hf, "intermediate_size", DEFAULTS["intermediate_size"]),
        count,
        whole(hf, "num_experts_per_tok", 4),
        normalised=True,
        biased=True,
        clamp=Clamp(number(hf, "swiglu_alpha", 1.702), number(hf, "swiglu_limit", 7.0)),
    )
    if experts.chosen > count:
        raise UnsupportedModelError(f"num_experts_per_tok is {experts.chosen}, of {count} experts")
    types = hf.get("layer_types")
    if types is None:
        types = [FULL if layer % 2 else SLIDING for layer in range(num_layers)]
    shared = {key: value for key, value in hf.items() if key not in ("num_experts", "num_local_experts")}
    if not hf.get("rope_parameters") and not hf.get("rope_scaling"):
        shared["rope_parameters"] = _ROPE
    return llama.read_common(
        {"rope_theta": 150_000.0} | shared,
        DEFAULTS,
        family="gpt_oss",
        biased=llama.ATTENTION if flag(hf, "attention_bias", True) else (),
        sinks=True,
        wide_norms=True,
        windows=windows_of_layer_types(types, num_layers, hf.get("sliding_window", 128)),
        experts=[experts] * num_layers,
    )
