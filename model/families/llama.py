"""Llama 2, 3, 3.1, 3.2 and other models with model_type `llama`, such as SmolLM2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..config import Attention, Experts, GatedMlp, Layer, ModelConfig, Rope, UnsupportedModelError, fold
from .options import flag, number, tokens, whole
from .rotary import longest_sequence, read_rope

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

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")

DEFAULTS: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "eos_token_id": 2,
    "rms_norm_eps": 1e-6,
}
"""transformers' defaults for keys missing from config.json. They differ between families."""

OF_OTHERS = {
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "query_pre_attn_scalar": None,
    "attention_multiplier": 1.0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "logit_scale": 1.0,
    "attention_chunk_size": None,
    "no_rope_layers": None,
    "num_experts": 0,
    "num_local_experts": 0,
    "per_layer_config": None,
}
"""Options that change the arithmetic of other families, with their neutral values. transformers ignores them
for this family. A folder that sets one was made for a reader that does not ignore it, so it is refused."""


def read(hf: dict[str, Any]) -> ModelConfig:
    """Convert a Llama config.json. Llama has no sliding windows, whatever the file says."""
    attention = ATTENTION if flag(hf, "attention_bias") else ()
    mlp = MLP if flag(hf, "mlp_bias") else ()
    if not hf.get("head_dim") and whole(hf, "hidden_size", 4096) % whole(hf, "num_attention_heads", 32):
        raise UnsupportedModelError("hidden_size is not a multiple of num_attention_heads")
    return read_common(hf, DEFAULTS, family="llama", biased=attention + mlp)


def read_common(
    hf: dict[str, Any],
    defaults: dict[str, Any],
    *,
    family: str,
    biased: tuple[str, ...] = (),
    qk_norm: bool = False,
    sinks: bool = False,
    wide_norms: bool = False,
    fused: bool = False,
    windows: Sequence[int | None] = (),
    experts: Sequence[Experts | None] = (),
) -> ModelConfig:
    """Convert what all dense families share; the options are those in which they differ.

    `windows` is each layer's sliding window, or nothing if there are none; `experts` is each layer's mixture,
    None for a dense MLP. Raises UnsupportedModelError for invalid values, and for options that would change
    the arithmetic and are not supported.
    """
    refuse_unknown_arithmetic(hf)
    heads = whole(hf, "num_attention_heads", defaults["num_attention_heads"])
    stated_kv_heads = hf.get("num_key_value_heads", defaults["num_key_value_heads"])
    kv_heads = heads if stated_kv_heads is None else whole(hf, "num_key_value_heads", stated_kv_heads)
    if heads % kv_heads:
        raise UnsupportedModelError(
            f"num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({kv_heads})"
        )
    hidden_size = whole(hf, "hidden_size", defaults["hidden_size"])
    stated_head_dim = hf.get("head_dim", defaults["head_dim"])
    head_dim = hidden_size // heads if stated_head_dim is None else whole(hf, "head_dim", stated_head_dim)
    if head_dim % 2 or not head_dim:
        raise UnsupportedModelError(f"head_dim is {head_dim}; rotary embeddings need an even number")
    max_position = whole(hf, "max_position_embeddings", defaults["max_position_embeddings"])
    theta, scaling = read_rope(hf, max_position)
    if scaling is not None and scaling.kind == "longrope" and len(scaling.factors) != head_dim // 2:
        raise UnsupportedModelError(
            f"short_factor has {len(scaling.factors)} numbers; a head has {head_dim // 2} frequencies"
        )
    num_layers = whole(hf, "num_hidden_layers", defaults["num_hidden_layers"])
    mlp = GatedMlp(
        hidden_size,
        whole(hf, "intermediate_size", defaults["intermediate_size"]),
        tuple(name for name in MLP if name in biased),
        fused,
    )
    layers = [
        Layer(
            Attention(
                hidden_size,
                heads,
                kv_heads,
                head_dim,
                Rope(theta, head_dim, scaling),
                window,
                tuple(name for name in ATTENTION if name in biased),
                qk_norm,
                sinks,
                fused,
            ),
            mixture or mlp,
        )
        for window, mixture in zip(
            windows or (None,) * num_layers, experts or (None,) * num_layers, strict=True
        )
    ]
    return ModelConfig(
        family,
        whole(hf, "vocab_size", defaults["vocab_size"]),
        hidden_size,
        fold(layers),
        number(hf, "rms_norm_eps", defaults["rms_norm_eps"]),
        longest_sequence(max_position, scaling),
        flag(hf, "tie_word_embeddings"),
        tokens(hf, "eos_token_id", defaults["eos_token_id"]),
        wide_norms,
    )


def refuse_unknown_arithmetic(hf: dict[str, Any]) -> None:
    """Raise UnsupportedModelError for an activation or an option that is not computed, naming it."""
    act = hf.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise UnsupportedModelError(f"hidden_act {act!r} is not supported; known: silu")
    for option, neutral in OF_OTHERS.items():
        if (value := hf.get(option, neutral)) not in (neutral, None):
            raise UnsupportedModelError(f"{option} {value!r} is not supported for {hf['model_type']}")
