"""Gemma 3: norms before and after attention and the MLP, windows in most layers, and a rope for each of these
two kinds of layers.

A folder of a model that sees (`gemma3`) is read as its text half (`gemma3_text`); the tower stays on disk and
is copied on export.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..config import Attention, GatedMlp, Layer, ModelConfig, Rope, UnsupportedModelError, fold
from . import llama, qwen3
from .options import flag, number, whole
from .rotary import longest_sequence, read_rope
from .text_half import text_half
from .windows import FULL, SLIDING, windows_of_layer_types

TENSORS = qwen3.TENSORS | {
    f"layers.{name}.weight": f"model.layers.{{layer}}.{name}.weight"
    for name in ("pre_feedforward_layernorm", "post_feedforward_layernorm")
}
PREFIXES = ("language_model.model.", "model.language_model.")
NESTED = True
COPIED = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")

DEFAULTS = llama.DEFAULTS | {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "eos_token_id": 1,
}
_THETA = {FULL: 1_000_000.0, SLIDING: 10_000.0}
_PATTERN = 6


_OWN = ("query_pre_attn_scalar", "hidden_act", "rope_parameters", "rope_scaling", "rope_theta")
"""Keys that are read here, and not as the other families read them."""


def read(hf: dict[str, Any]) -> ModelConfig:
    """Convert a Gemma 3 config.json, of the text half alone or with a `text_config`."""
    hf = text_half({"tie_word_embeddings": True} | hf)
    if (activation := hf.get("hidden_activation", "gelu_pytorch_tanh")) != "gelu_pytorch_tanh":
        raise UnsupportedModelError(
            f"hidden_activation {activation!r} is not supported; known: gelu_pytorch_tanh"
        )
    if hf.get("use_bidirectional_attention"):
        raise UnsupportedModelError("use_bidirectional_attention is not supported: attention is causal here")
    common = llama.read_common(
        {key: value for key, value in hf.items() if key not in _OWN},
        DEFAULTS,
        family="gemma3_text",
        qk_norm=True,
        biased=llama.ATTENTION if flag(hf, "attention_bias") else (),
    )
    (layer,) = set(common.layers)
    mixer, mlp = layer.mixer, layer.mlp
    assert isinstance(mixer, Attention)
    assert isinstance(mlp, GatedMlp)
    types = _layer_types(hf, common.num_layers)
    windows = windows_of_layer_types(types, common.num_layers, hf.get("sliding_window", 4096))
    ropes = _ropes(hf, mixer.head_dim, common.max_sequence_length)
    mixer = replace(mixer, score_scale=number(hf, "query_pre_attn_scalar", 256.0) ** -0.5)
    mlp = replace(mlp, activation="gelu_tanh")
    longest = min(longest_sequence(common.max_sequence_length, rope.scaling) for rope in ropes.values())
    return replace(
        common,
        groups=fold(
            [
                Layer(
                    replace(mixer, window=window, rope=ropes[FULL if window is None else SLIDING]), mlp, True
                )
                for window in windows
            ]
        ),
        max_sequence_length=longest,
        centred_norms=True,
        embedding_scale=common.hidden_size**0.5,
    )


def _layer_types(hf: dict[str, Any], num_layers: int) -> Any:
    if hf.get("layer_types") is not None:
        return hf["layer_types"]
    pattern = whole(hf, "sliding_window_pattern", _PATTERN)
    return [SLIDING if (layer + 1) % pattern else FULL for layer in range(num_layers)]


def _ropes(hf: dict[str, Any], head_dim: int, max_position: int) -> dict[str, Rope]:
    """Read the rope of each kind of layer.

    Older files have `rope_theta`, `rope_local_base_freq`, and a `rope_scaling` that is of full attention."""
    stated = hf.get("rope_parameters") or {}
    if not isinstance(stated, dict) or not stated.keys() <= _THETA.keys():
        raise UnsupportedModelError(f"rope_parameters is {stated!r}; it must have an entry per layer type")
    older = {FULL: "rope_theta", SLIDING: "rope_local_base_freq"}
    found = {}
    for kind, theta in _THETA.items():
        own = stated.get(kind) or {}
        if kind == FULL and isinstance(hf.get("rope_scaling"), dict):
            own = own | hf["rope_scaling"]
        rope = {"rope_parameters": {"rope_theta": hf.get(older[kind], theta)} | own}
        theta, scaling = read_rope(rope, max_position)
        found[kind] = Rope(theta, head_dim, scaling)
    return found
