"""Nemotron-H, Nemotron Nano 2 and Nemotron 3: each layer is a Mamba-2, attention, an MLP or a mixture.

Attention has no rotary embedding, whatever config.json says of one. MLPs and experts have no gate, and those
of the larger Nemotron 3 work on a latent projection. Time steps have a least value, in decoding as in
training: transformers leaves it out for single tokens. The layers for prediction of several tokens at once
are not used.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..config import (
    Attention,
    Experts,
    Layer,
    Mamba2,
    ModelConfig,
    PlainMlp,
    Rope,
    UnsupportedModelError,
    fold,
)
from . import deepseek_v3, llama
from .options import flag, number, tokens, whole

_MIXER = "model.layers.{layer}.mixer."
TENSORS = {
    "embed_tokens.weight": "model.embeddings.weight",
    "norm.weight": "model.norm_f.weight",
    "lm_head.weight": "lm_head.weight",
    "layers.input_layernorm.weight": "model.layers.{layer}.norm.weight",
    "layers.mamba_norm.weight": _MIXER + "norm.weight",
    "layers.conv1d_bias.weight": _MIXER + "conv1d.bias",
    "layers.router.weight": _MIXER + "gate.weight",
    "layers.router.bias": _MIXER + "gate.e_score_correction_bias",
}
TENSORS |= {f"layers.{name}_proj.weight": _MIXER + "in_proj.weight" for name in ("gate", "x", "b", "c", "dt")}
TENSORS |= {f"layers.{name}.weight": _MIXER + name for name in ("A_log", "D", "dt_bias")}
TENSORS |= {
    f"layers.{name}_proj.weight": f"{_MIXER}{name}_proj.weight" for name in ("q", "k", "v", "o", "out")
}
TENSORS |= {
    f"layers.{name}.weight": f"{_MIXER}{name}.weight"
    for name in ("conv1d", "fc1_latent_proj", "fc2_latent_proj")
}
for _name in ("up", "down"):
    TENSORS |= {
        f"layers.{_name}_proj.weight": f"{_MIXER}{_name}_proj.weight",
        f"layers.shared_{_name}.weight": f"{_MIXER}shared_experts.{_name}_proj.weight",
        f"layers.expert_{_name}.weight": f"{_MIXER}experts.{{expert}}.{_name}_proj.weight",
    }
UNTRANSPOSED = {_MIXER + "conv1d.weight"}
PREFIXES = ("backbone.",)
COPIED = ("mtp.",)

DEFAULTS: dict[str, Any] = {
    "vocab_size": 131_072,
    "hidden_size": 4096,
    "intermediate_size": 21_504,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "layer_norm_epsilon": 1e-5,
    "eos_token_id": 2,
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "ssm_state_size": 128,
    "conv_kernel": 4,
    "time_step_min": 0.001,
    "use_conv_bias": True,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 7688,
    "moe_shared_expert_intermediate_size": 7688,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
}
_EARLIER_NAMES = {
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_dt_min": "time_step_min",
    "mamba_dt_limit": "time_step_limit",
    "mamba_conv_bias": "use_conv_bias",
    "num_local_experts": "n_routed_experts",
}
_ONLY = {
    "attention_bias": False,
    "mamba_proj_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "residual_in_fp32": False,
    "tie_word_embeddings": False,
    "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu",
    "n_shared_experts": 1,
    "sliding_window": None,
}
"""Options with the only value that is computed here, which most of them have in transformers too."""
_UNLIMITED = tuple([0.0, most] for most in (float("inf"), "Infinity", {"__float__": "Infinity"}))
"""The forms of a `time_step_limit` without effect; transformers has no other."""
MAMBA, ATTENTION, MLP, MIXTURE = "M", "*", "-", "E"
_LETTERS = {
    "linear_attention": MAMBA,
    "mamba": MAMBA,
    "full_attention": ATTENTION,
    "attention": ATTENTION,
    "mlp": MLP,
    "moe": MIXTURE,
}


def read(hf: dict[str, Any]) -> ModelConfig:
    """Convert the config.json of a Nemotron-H."""
    hf = DEFAULTS | {_EARLIER_NAMES.get(key, key): value for key, value in hf.items()}
    for option, computed in _ONLY.items():
        if (value := hf.get(option)) not in (computed, None):
            raise UnsupportedModelError(
                f"{option} {value!r} is not supported for {hf['model_type']}; known: {computed!r}"
            )
    if (limit := hf.get("time_step_limit")) is not None and limit not in _UNLIMITED:
        raise UnsupportedModelError(f"time_step_limit {limit!r} is not supported; known: [0.0, Infinity]")
    llama.refuse_unknown_arithmetic(hf)
    hidden = whole(hf, "hidden_size")
    of_letter = {
        MAMBA: lambda: Layer(_mamba(hf, hidden), None),
        ATTENTION: lambda: Layer(_attention(hf, hidden), None),
        MLP: lambda: Layer(None, PlainMlp(hidden, whole(hf, "intermediate_size"))),
        MIXTURE: lambda: Layer(None, _experts(hf, hidden)),
    }
    letters = _letters(hf)
    layer_of = {letter: of_letter[letter]() for letter in dict.fromkeys(letters)}
    return ModelConfig(
        "nemotron_h",
        whole(hf, "vocab_size"),
        hidden,
        fold([layer_of[letter] for letter in letters]),
        number(hf, "layer_norm_epsilon"),
        whole(hf, "max_position_embeddings"),
        eos_token_ids=tokens(hf, "eos_token_id"),
        wide_norms=True,
    )


def _letters(hf: dict[str, Any]) -> list[str]:
    """Return a letter for each layer. A list of types takes precedence over a pattern of letters."""
    key = next((key for key in ("layers_block_type", "layer_types") if hf.get(key) is not None), None)
    if key is None:
        key, known = "hybrid_override_pattern", "".join((MAMBA, MIXTURE, ATTENTION, MLP))
        stated = hf.get(key, known)
        letters = list(stated) if isinstance(stated, str) else [stated]
    else:
        known = ", ".join(_LETTERS)
        stated = hf[key] if isinstance(hf[key], list) else [hf[key]]
        letters = [_LETTERS.get(each, each) if isinstance(each, str) else each for each in stated]
    for each in letters:
        if each not in (MAMBA, ATTENTION, MLP, MIXTURE):
            raise UnsupportedModelError(f"{key}: {each!r} is not supported; known: {known}")
    if ATTENTION not in letters:
        raise UnsupportedModelError(f"{key} has no attention; at least one layer must have it")
    return letters


def _mamba(hf: dict[str, Any], hidden: int) -> Mamba2:
    heads, groups = whole(hf, "mamba_num_heads"), whole(hf, "n_groups")
    if heads % groups:
        raise UnsupportedModelError(f"mamba_num_heads ({heads}) is not a multiple of n_groups ({groups})")
    return Mamba2(
        hidden,
        heads,
        whole(hf, "mamba_head_dim"),
        groups,
        whole(hf, "ssm_state_size"),
        whole(hf, "conv_kernel", least=2),
        number(hf, "time_step_min"),
        flag(hf, "use_conv_bias"),
    )


def _attention(hf: dict[str, Any], hidden: int) -> Attention:
    heads = whole(hf, "num_attention_heads")
    kv_heads = heads if hf["num_key_value_heads"] is None else whole(hf, "num_key_value_heads")
    if heads % kv_heads:
        raise UnsupportedModelError(
            f"num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({kv_heads})"
        )
    return Attention(hidden, heads, kv_heads, whole(hf, "head_dim"), Rope(1.0, 0))


def _experts(hf: dict[str, Any], hidden: int) -> Experts:
    latent = None if hf.get("moe_latent_size") is None else whole(hf, "moe_latent_size")
    shared = whole(hf, "moe_shared_expert_intermediate_size")
    return replace(deepseek_v3.read_experts(hf, hidden), shared=shared, plain=True, latent=latent)
