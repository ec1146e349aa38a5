"""Qwen3.5, 3.6 and 3.8: gated delta nets, and in every fourth layer attention with an output gate.

A folder of a model that sees is read as its text half: a nested config, and names with `language_model`. The
tower and the layers for multi-token prediction stay on disk, and are copied on export. Without images, the
three axes of the interleaved mrope have equal positions, so it is plain rope.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..config import Attention, DeltaNet, Experts, Layer, ModelConfig, Rope, UnsupportedModelError, fold
from . import llama, qwen3
from .options import flag, number, whole
from .text_half import text_half
from .windows import FULL

_DELTA = "model.layers.{layer}.linear_attn."
TENSORS = qwen3.TENSORS | {
    "layers.in_proj_q.weight": _DELTA + "in_proj_qkv.weight",
    "layers.in_proj_k.weight": _DELTA + "in_proj_qkv.weight",
    "layers.in_proj_v.weight": _DELTA + "in_proj_qkv.weight",
    "layers.in_proj_z.weight": _DELTA + "in_proj_z.weight",
    "layers.in_proj_b.weight": _DELTA + "in_proj_b.weight",
    "layers.in_proj_a.weight": _DELTA + "in_proj_a.weight",
    "layers.out_proj.weight": _DELTA + "out_proj.weight",
    "layers.delta_norm.weight": _DELTA + "norm.weight",
    "layers.conv1d.weight": _DELTA + "conv1d.weight",
    "layers.A_log.weight": _DELTA + "A_log",
    "layers.dt_bias.weight": _DELTA + "dt_bias",
}
UNTRANSPOSED = {_DELTA + "conv1d.weight"}
PREFIXES = ("model.language_model.",)
COPIED = ("model.visual.", "mtp.")

DEFAULTS = llama.DEFAULTS | {
    "vocab_size": 248_320,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 32_768,
    "eos_token_id": None,
}
LINEAR = "linear_attention"
_OF_IMAGES = ("mrope_section", "mrope_interleaved")


def read(hf: dict[str, Any]) -> ModelConfig:
    """Convert a Qwen3.5 config.json, of the text half alone or with a `text_config`."""
    return read_hybrid(text_half(hf), DEFAULTS)


def read_hybrid(hf: dict[str, Any], defaults: dict[str, Any], experts: Experts | None = None) -> ModelConfig:
    """Convert what the dense models and the mixtures share."""
    for key, known in (("output_gate_type", "swish"), ("attn_output_gate", True)):
        if hf.get(key, known) not in (known, None):
            raise UnsupportedModelError(f"{key} {hf[key]!r} is not supported; known: {known!r}")
    hf, share = _without_partial_rope(hf)
    num_layers = whole(hf, "num_hidden_layers", defaults["num_hidden_layers"])
    common = llama.read_common(
        hf,
        defaults,
        family=hf["model_type"],
        qk_norm=True,
        biased=llama.ATTENTION if flag(hf, "attention_bias") else (),
        experts=[experts] * num_layers,
    )
    (layer,) = set(common.layers)
    assert isinstance(layer.mixer, Attention)
    dims = int(layer.mixer.head_dim * share)
    if dims % 2 or not dims:
        raise UnsupportedModelError(
            f"partial_rotary_factor {share} of head_dim {layer.mixer.head_dim} is {dims}; rotary embeddings "
            "need an even number"
        )
    rope = Rope(layer.mixer.rope.theta, dims, layer.mixer.rope.scaling)
    full = Layer(replace(layer.mixer, rope=rope, gated=True), layer.mlp)
    linear = Layer(_delta_net(hf, common.hidden_size), layer.mlp)
    of_type = {FULL: full, LINEAR: linear}
    layers = [of_type[each] for each in _layer_types(hf, num_layers)]
    return replace(common, groups=fold(layers), centred_norms=True)


def _without_partial_rope(hf: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """Return the config without what `read_rope` does not know, and the share of a head that is rotated."""
    key = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    rope = hf.get(key) or {}
    if not isinstance(rope, dict):
        raise UnsupportedModelError(f"{key} is {rope!r}; it must be an object")
    stated = rope if "partial_rotary_factor" in rope else hf
    share = number(stated, "partial_rotary_factor", 0.25)
    if share > 1:
        raise UnsupportedModelError(f"partial_rotary_factor is {share}; it must be at most 1")
    rope = {name: value for name, value in rope.items() if name not in (*_OF_IMAGES, "partial_rotary_factor")}
    return {name: value for name, value in hf.items() if name != "partial_rotary_factor"} | {key: rope}, share


def _delta_net(hf: dict[str, Any], hidden: int) -> DeltaNet:
    key_heads, value_heads = whole(hf, "linear_num_key_heads", 16), whole(hf, "linear_num_value_heads", 32)
    if value_heads % key_heads:
        raise UnsupportedModelError(
            f"linear_num_value_heads ({value_heads}) is not a multiple of linear_num_key_heads ({key_heads})"
        )
    return DeltaNet(
        hidden,
        key_heads,
        value_heads,
        whole(hf, "linear_key_head_dim", 128),
        whole(hf, "linear_value_head_dim", 128),
        whole(hf, "linear_conv_kernel_dim", 4, least=2),
    )


def _layer_types(hf: dict[str, Any], num_layers: int) -> list[str]:
    types = hf.get("layer_types")
    if types is None:
        every = whole(hf, "full_attention_interval", 4)
        return [FULL if (layer + 1) % every == 0 else LINEAR for layer in range(num_layers)]
    if not isinstance(types, list) or len(types) != num_layers:
        count = f"{len(types)} entries" if isinstance(types, list) else repr(types)
        raise UnsupportedModelError(f"layer_types has {count}; it must list all {num_layers} layers")
    for each in types:
        if each not in (FULL, LINEAR):
            raise UnsupportedModelError(f"layer_types: {each!r} is not supported; known: {FULL}, {LINEAR}")
    if FULL not in types:
        raise UnsupportedModelError(f"layer_types has no {FULL}; at least one layer must be of that type")
    return types
