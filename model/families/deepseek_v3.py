"""DeepSeek-V3 and V3.1, and Kimi-K2, which has the same arithmetic: latent attention, and mixtures of experts
that are chosen by groups, after a few dense layers.

The layers for prediction of several tokens at once, which files may have after the last one, are not used.
"""

from __future__ import annotations

import math
from typing import Any

from ..config import (
    Experts,
    GatedMlp,
    Latent,
    Layer,
    ModelConfig,
    Rope,
    SigmoidRouter,
    UnsupportedModelError,
    fold,
)
from . import llama
from .options import flag, number, tokens, whole
from .rotary import longest_sequence, read_rope

_LAYER = "model.layers.{layer}."
_EXPERT = _LAYER + "mlp.experts.{expert}."
_ATTENTION = ("q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj")
TENSORS = (
    llama.TENSORS
    | {f"layers.{name}.weight": f"{_LAYER}self_attn.{name}.weight" for name in _ATTENTION}
    | {
        "layers.router.weight": _LAYER + "mlp.gate.weight",
        "layers.router.bias": _LAYER + "mlp.gate.e_score_correction_bias",
    }
    | {f"layers.expert_{name}.weight": f"{_EXPERT}{name}_proj.weight" for name in ("gate", "up", "down")}
    | {
        f"layers.shared_{name}.weight": f"{_LAYER}mlp.shared_experts.{name}_proj.weight"
        for name in ("gate", "up", "down")
    }
)

COPIED = ("model.layers.",)  # the layers after the last one
QUANTIZED = ("fp8", "compressed-tensors")

DEFAULTS = {
    "vocab_size": 129_280,
    "hidden_size": 7168,
    "intermediate_size": 18_432,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "max_position_embeddings": 4096,
    "eos_token_id": 1,
    "rms_norm_eps": 1e-6,
}
_ONLY = {"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
"""Options that transformers does not read, with the value that it computes."""


def read(hf: dict[str, Any]) -> ModelConfig:
    """Convert the config.json of a DeepSeek-V3 or a Kimi-K2."""
    hf = DEFAULTS | hf
    hidden, num_layers = whole(hf, "hidden_size"), whole(hf, "num_hidden_layers")
    mixer, dense = _latent(hf, hidden), whole(hf, "first_k_dense_replace", 3, least=0)
    mlp = GatedMlp(hidden, whole(hf, "intermediate_size"))
    mlps: list[GatedMlp | Experts] = [mlp] * min(dense, num_layers)
    if dense < num_layers:
        mlps += [read_experts(hf, hidden)] * (num_layers - dense)
    llama.refuse_unknown_arithmetic(
        {key: value for key, value in hf.items() if key not in ("num_experts", "num_local_experts")}
    )
    for option, computed in _ONLY.items():
        if (value := hf.get(option, computed)) not in (computed, None):
            raise UnsupportedModelError(f"{option} {value!r} is not supported for {hf['model_type']}")
    return ModelConfig(
        "deepseek_v3",
        whole(hf, "vocab_size"),
        hidden,
        fold([Layer(mixer, mlp) for mlp in mlps]),
        number(hf, "rms_norm_eps"),
        longest_sequence(whole(hf, "max_position_embeddings"), mixer.rope.scaling),
        flag(hf, "tie_word_embeddings"),
        tokens(hf, "eos_token_id"),
    )


def _latent(hf: dict[str, Any], hidden: int) -> Latent:
    heads, rope_dim = whole(hf, "num_attention_heads"), whole(hf, "qk_rope_head_dim", 64)
    for key, only in (("num_key_value_heads", heads), ("head_dim", rope_dim)):
        if hf.get(key) not in (None, only):
            raise UnsupportedModelError(f"{key} is {hf[key]!r}; with latent attention it must be {only}")
    if rope_dim % 2:
        raise UnsupportedModelError(f"qk_rope_head_dim is {rope_dim}; rotary embeddings need an even number")
    theta, scaling = read_rope(hf, whole(hf, "max_position_embeddings"))
    biased = ("q_a_proj", "kv_a_proj_with_mqa", "o_proj") if flag(hf, "attention_bias") else ()
    stated_rank = hf.get("q_lora_rank", 1536)
    return Latent(
        hidden,
        heads,
        None if stated_rank is None else whole(hf, "q_lora_rank", 1536),
        whole(hf, "kv_lora_rank", 512),
        whole(hf, "qk_nope_head_dim", 128),
        rope_dim,
        whole(hf, "v_head_dim", 128),
        Rope(theta, rope_dim, scaling, flag(hf, "rope_interleave", True)),
        _score_factor(hf),
        biased,
    )


def _score_factor(hf: dict[str, Any]) -> float:
    """Return what YaRN multiplies the scores with: (0.1 x mscale_all_dim x ln(factor) + 1)^2."""
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default" or not rope.get("mscale_all_dim"):
        return 1.0
    factor = number(rope, "factor")
    return 1.0 if factor <= 1 else (0.1 * number(rope, "mscale_all_dim") * math.log(factor) + 1.0) ** 2


def read_experts(hf: dict[str, Any], hidden: int) -> Experts:
    """Convert what config.json says of a mixture with a sigmoid router."""
    # transformers has both names for it
    count = whole(hf, "num_local_experts" if "num_local_experts" in hf else "n_routed_experts", 256)
    width, chosen = whole(hf, "moe_intermediate_size", 2048), whole(hf, "num_experts_per_tok", 8)
    groups, groups_chosen = whole(hf, "n_group", 8), whole(hf, "topk_group", 4)
    if count % groups or (groups > 1 and count < 2 * groups):
        raise UnsupportedModelError(
            f"n_group is {groups}, of {count} experts; groups of two or more are needed"
        )
    if groups_chosen > groups or chosen > groups_chosen * (count // groups):
        raise UnsupportedModelError(
            f"num_experts_per_tok is {chosen}, of {count} experts in {groups} groups; topk_group is "
            f"{groups_chosen}"
        )
    return Experts(
        hidden,
        width,
        count,
        chosen,
        flag(hf, "norm_topk_prob", True),
        sigmoid=SigmoidRouter(groups, groups_chosen, number(hf, "routed_scaling_factor", 2.5)),
        shared=width * whole(hf, "n_shared_experts", 1),
    )
