"""Phi-3 and others with model_type `phi3`: Llama with q, k and v in one matrix, and gate and up in another.

Their adapters are of the fused matrices too, as PEFT's are. `longrope` is computed for sequences up to
`original_max_position_embeddings`, which is then the model's longest.
"""

from __future__ import annotations

from typing import Any

from ..config import ModelConfig, UnsupportedModelError
from . import llama, qwen2
from .windows import window_of_all_layers

_LAYER = "model.layers.{layer}."
_SEPARATE = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
TENSORS = {name: theirs for name, theirs in llama.TENSORS.items() if name.split(".")[-2] not in _SEPARATE} | {
    "layers.qkv_proj.weight": _LAYER + "self_attn.qkv_proj.weight",
    "layers.gate_up_proj.weight": _LAYER + "mlp.gate_up_proj.weight",
}

DEFAULTS = llama.DEFAULTS | {
    "vocab_size": 32_064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "eos_token_id": 32_000,
    "rms_norm_eps": 1e-5,
}
_LONGROPE = ("su", "yarn", "longrope")  # older files have other names for it


def read(hf: dict[str, Any]) -> ModelConfig:
    """Convert a Phi-3 config.json. All layers have the window, unless it is null or absent."""
    qwen2.refuse_mlp_bias(hf)
    if hf.get("attention_bias"):
        raise UnsupportedModelError("attention_bias is not supported for phi3")
    windows = window_of_all_layers(hf, if_absent=None)
    hf = {"original_max_position_embeddings": 4096} | hf
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(rope := hf.get(key), dict):
            hf[key] = _rope(key, rope)
    return llama.read_common(hf, DEFAULTS, family="phi3", windows=windows, fused=True)


def _rope(key: str, rope: dict[str, Any]) -> dict[str, Any]:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", *_LONGROPE):
        raise UnsupportedModelError(f"{key}: rope_type {kind!r} is not supported for phi3; known: longrope")
    return rope | {"rope_type": "longrope" if kind in _LONGROPE else "default"}
