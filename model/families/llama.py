"""Llama 2, 3, 3.1, 3.2 and all that call themselves so (SmolLM2 among them)."""

from __future__ import annotations

from ..config import ModelConfig, RopeScaling, UnsupportedModelError

TENSORS = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "layers.input_layernorm.weight": "model.layers.{layer}.input_layernorm.weight",
    "layers.q_proj.weight": "model.layers.{layer}.self_attn.q_proj.weight",
    "layers.k_proj.weight": "model.layers.{layer}.self_attn.k_proj.weight",
    "layers.v_proj.weight": "model.layers.{layer}.self_attn.v_proj.weight",
    "layers.o_proj.weight": "model.layers.{layer}.self_attn.o_proj.weight",
    "layers.post_attention_layernorm.weight": "model.layers.{layer}.post_attention_layernorm.weight",
    "layers.gate_proj.weight": "model.layers.{layer}.mlp.gate_proj.weight",
    "layers.up_proj.weight": "model.layers.{layer}.mlp.up_proj.weight",
    "layers.down_proj.weight": "model.layers.{layer}.mlp.down_proj.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}


def read(hf: dict) -> ModelConfig:
    """A Llama config.json as our config."""
    return read_common(hf, family="llama")


def read_common(hf: dict, family: str, **family_options) -> ModelConfig:
    """What all dense families share; `family_options` are the ModelConfig fields that differ.

    Raises UnsupportedModelError for options that would change the arithmetic and that we do not have.
    """
    _reject_unknown_arithmetic(hf, family, has_qkv_bias=family_options.get("attention_bias", False))
    theta, scaling = _read_rope(hf)
    eos = hf.get("eos_token_id")
    options = {
        "family": family,
        "vocab_size": hf["vocab_size"],
        "hidden_size": hf["hidden_size"],
        "intermediate_size": hf["intermediate_size"],
        "num_layers": hf["num_hidden_layers"],
        "num_heads": hf["num_attention_heads"],
        "num_kv_heads": hf.get("num_key_value_heads") or hf["num_attention_heads"],
        "head_dim": hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        "rms_norm_eps": hf.get("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "max_sequence_length": hf.get("max_position_embeddings", 2048),
        "tie_embeddings": hf.get("tie_word_embeddings", False),
        "sliding_window": _read_sliding_window(hf),
        "eos_token_ids": tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
    }
    return ModelConfig(**(options | family_options))


def _read_rope(hf: dict) -> tuple[float, RopeScaling | None]:
    """Both layouts: `rope_theta` beside `rope_scaling`, and transformers 5's one `rope_parameters`."""
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    theta = float(rope.get("rope_theta") or hf.get("rope_theta", 10_000.0))
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if hf.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError("partial_rotary_factor other than 1 is not supported")
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", float(rope["factor"]))
    if kind == "llama3":
        return theta, RopeScaling(
            "llama3",
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_max_position=int(rope["original_max_position_embeddings"]),
        )
    raise UnsupportedModelError(f"rope scaling {kind!r} is not supported; known: default, linear, llama3")


def _read_sliding_window(hf: dict) -> int | None:
    if not hf.get("use_sliding_window", False) or not hf.get("sliding_window"):
        return None
    kinds = set(hf.get("layer_types") or ())
    first_windowed_layer = hf.get("max_window_layers", 0)
    if kinds == {"full_attention"} or first_windowed_layer >= hf["num_hidden_layers"]:
        return None
    if len(kinds) > 1 or (not kinds and first_windowed_layer > 0):
        raise UnsupportedModelError("layers with and without a sliding window in one model are not supported")
    return hf["sliding_window"]


def _reject_unknown_arithmetic(hf: dict, family: str, has_qkv_bias: bool) -> None:
    if hf.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UnsupportedModelError(f"hidden_act {hf['hidden_act']!r} is not supported; known: silu")
    for option in ("attention_bias", "mlp_bias"):
        if hf.get(option, False) and not (option == "attention_bias" and has_qkv_bias):
            raise UnsupportedModelError(f"{option} is not supported for {family}")
