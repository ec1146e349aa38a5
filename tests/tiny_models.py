"""Tiny random models of every family, written as Hugging Face folders without torch.

    from tiny_models import write_model
    folder = write_model(tmp_path / "m", "qwen3")

Each folder has config.json, generation_config.json, safetensors (several files with an index when
`shards` > 1) and a small real byte-level BPE tokenizer with chat special tokens and a chat template.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

VOCAB_SIZE = 320
BOS, EOS = "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = ["<|endoftext|>", BOS, EOS]  # ids 0, 1, 2, as SmolLM2 has them
EOS_ID = 2

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "bos_token_id": 1,
    "eos_token_id": EOS_ID,
    "pad_token_id": EOS_ID,
    "tie_word_embeddings": True,
}

VARIANTS: dict[str, dict] = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "llama3": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": False,
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "qwen2_untied": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "tie_word_embeddings": False,
    },
    "qwen3": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": 16,  # not hidden / heads
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": False,
    },
    "mistral": {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": 21,
        "tie_word_embeddings": False,
    },
    "phi3": {
        "model_type": "phi3",
        "architectures": ["Phi3ForCausalLM"],
        "sliding_window": 21,
        "tie_word_embeddings": False,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "head_dim": 16,
        "moe_intermediate_size": 24,  # twice of which is not hidden_size
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "num_key_value_heads": 4,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "q_lora_rank": 20,
        "kv_lora_rank": 28,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        "tie_word_embeddings": False,
    },
    "gemma3_text": {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "head_dim": 16,
        "query_pre_attn_scalar": 20,
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 21,
        "sliding_window_pattern": 2,
        "rope_theta": 100_000.0,
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "head_dim": 16,
        "intermediate_size": 48,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "swiglu_limit": 1.5,  # often reached
        "sliding_window": 21,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "truncate": False,
            "original_max_position_embeddings": 64,
        },
        "tie_word_embeddings": False,
    },
}


_HYBRID = {
    "head_dim": 16,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "full_attention_interval": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 12,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
    "tie_word_embeddings": False,
}
VARIANTS |= {
    "qwen3_5": _HYBRID | {"model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"]},
    "qwen3_5_moe": _HYBRID
    | {
        "model_type": "qwen3_5_moe_text",
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 28,
        "num_experts": 8,
        "num_experts_per_tok": 3,
    },
}
VARIANTS["nemotron_h"] = {
    "model_type": "nemotron_h",
    "architectures": ["NemotronHForCausalLM"],
    "hybrid_override_pattern": "MEME*-",
    "head_dim": 16,
    "intermediate_size": 44,
    "layer_norm_epsilon": 1e-5,
    "mamba_num_heads": 6,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 10,
    "time_step_min": 0.05,  # often reached
    "chunk_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 28,
    "moe_latent_size": 20,
    "tie_word_embeddings": False,
}
_SEES = {"qwen3_5", "qwen3_5_moe"}
"""The model types whose config.json is nested, and whose files have more than the text half."""


def hf_config(variant: str = "llama", **overrides) -> dict:
    """The config.json of a variant (`VARIANTS`), with `overrides` on top."""
    config = _COMMON | VARIANTS[variant] | {"torch_dtype": "float32"} | overrides
    if config["model_type"] not in _SEES:
        return config
    above = {
        key: config[key]
        for key in ("model_type", "architectures", "tie_word_embeddings", "eos_token_id", "torch_dtype")
    }
    text = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    vision = {
        "model_type": f"{config['model_type']}_vision",
        "depth": 1,
        "hidden_size": 16,
        "num_heads": 2,
        "intermediate_size": 24,
        "patch_size": 4,
        "num_position_embeddings": 16,
        "out_hidden_size": config["hidden_size"],
    }
    return above | {
        "text_config": text | {"model_type": f"{config['model_type']}_text"},
        "vision_config": vision,
    }


def write_model(
    folder: Path,
    variant: str = "llama",
    *,
    shards: int = 1,
    dtype: str = "float32",
    seed: int = 0,
    tokenizer: bool = True,
    **overrides,
) -> Path:
    """Write a random model of `variant` (a key of `VARIANTS`) into `folder` and return it.

    `overrides` go into config.json (HF names). `dtype`: float32, float16 or bfloat16, of the files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = hf_config(variant, **overrides)
    config["torch_dtype"] = dtype
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "generation_config.json",
        {"bos_token_id": 1, "eos_token_id": config["eos_token_id"], "pad_token_id": EOS_ID},
    )
    _write_weights(folder, random_weights(config, seed), shards, dtype)
    if tokenizer:
        write_tokenizer(folder)
    return folder


def random_weights(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """HF-named float32 weights of about unit activations; norms and biases are random too."""
    rng = np.random.default_rng(seed)
    if "text_config" in config:
        return _beside_others(random_weights(config["text_config"], seed), rng)
    if config["model_type"].startswith("qwen3_5"):
        return _hybrid(config, rng)
    if config["model_type"] == "nemotron_h":
        return _nemotron(config, rng)
    D, F = config["hidden_size"], config["intermediate_size"]
    N, K = config["num_attention_heads"], config["num_key_value_heads"]
    H = config.get("head_dim") or D // N

    def linear(out: int, into: int) -> np.ndarray:
        return (rng.standard_normal((out, into)) / np.sqrt(into)).astype(np.float32)

    def norm(size: int) -> np.ndarray:
        return (1 + 0.2 * rng.standard_normal(size)).astype(np.float32)

    weights = {"model.embed_tokens.weight": rng.standard_normal((config["vocab_size"], D)).astype(np.float32)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        if config["model_type"] == "deepseek_v3":
            weights |= _deepseek_layer(rng, at, config, layer)
            continue
        for name, heads in (("q_proj", N), ("k_proj", K), ("v_proj", K)):
            weights[f"{at}self_attn.{name}.weight"] = linear(heads * H, D)
            if config["model_type"] == "qwen2":
                bias = 0.3 * rng.standard_normal(heads * H)
                weights[f"{at}self_attn.{name}.bias"] = bias.astype(np.float32)
        weights[f"{at}self_attn.o_proj.weight"] = linear(D, N * H)
        if config["model_type"].startswith(("qwen3", "gemma3")):
            weights[f"{at}self_attn.q_norm.weight"] = norm(H)
            weights[f"{at}self_attn.k_norm.weight"] = norm(H)
        if config["model_type"] == "gpt_oss":
            weights |= _gpt_oss_layer(rng, at, config)
            weights[f"{at}input_layernorm.weight"] = norm(D)
            weights[f"{at}post_attention_layernorm.weight"] = norm(D)
            continue
        mlps = {f"{at}mlp.": F}
        if config["model_type"] == "qwen3_moe" and layer not in config.get("mlp_only_layers", []):
            weights[f"{at}mlp.gate.weight"] = linear(config["num_experts"], D)
            width = config["moe_intermediate_size"]
            mlps = {f"{at}mlp.experts.{expert}.": width for expert in range(config["num_experts"])}
        for mlp, width in mlps.items():
            weights[f"{mlp}gate_proj.weight"] = linear(width, D)
            weights[f"{mlp}up_proj.weight"] = linear(width, D)
            weights[f"{mlp}down_proj.weight"] = linear(D, width)
        weights[f"{at}input_layernorm.weight"] = norm(D)
        weights[f"{at}post_attention_layernorm.weight"] = norm(D)
    weights["model.norm.weight"] = norm(D)
    if config["tie_word_embeddings"]:
        # so that logits of a unit-norm hidden state are of order one
        weights["model.embed_tokens.weight"] /= np.sqrt(D).astype(np.float32)
    else:
        weights["lm_head.weight"] = linear(config["vocab_size"], D)
    if config["model_type"] == "gemma3_text":
        return _sandwiched(weights, norm)
    return _fused(weights) if config["model_type"] == "phi3" else weights


def _beside_others(weights: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The text half's weights under the names of a model that sees, and some of its other weights."""
    renamed = {name.replace("model.", "model.language_model.", 1): array for name, array in weights.items()}
    others = {"model.visual.patch_embed.proj.bias": 16, "mtp.norm.weight": 48}
    return renamed | {name: rng.standard_normal(size).astype(np.float32) for name, size in others.items()}


def _hybrid(config: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A Qwen3.5: delta nets and gated attention, a dense MLP or experts. Norms are around 0."""
    D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    N, K, H = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    G, R = config["linear_num_key_heads"], config["linear_num_value_heads"]
    keys, values = G * config["linear_key_head_dim"], R * config["linear_value_head_dim"]

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    def linear(out: int, into: int) -> np.ndarray:
        return normal(out, into, scale=into**-0.5)

    weights = {
        "model.embed_tokens.weight": normal(V, D),
        "model.norm.weight": normal(D, scale=0.2),
        "lm_head.weight": linear(V, D),
    }
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        if (layer + 1) % config["full_attention_interval"] == 0:
            mixer = {
                "self_attn.q_proj.weight": linear(2 * N * H, D),
                "self_attn.k_proj.weight": linear(K * H, D),
                "self_attn.v_proj.weight": linear(K * H, D),
                "self_attn.o_proj.weight": linear(D, N * H),
                "self_attn.q_norm.weight": normal(H, scale=0.2),
                "self_attn.k_norm.weight": normal(H, scale=0.2),
            }
        else:
            mixer = {
                "linear_attn.in_proj_qkv.weight": linear(2 * keys + values, D),
                "linear_attn.in_proj_z.weight": linear(values, D),
                "linear_attn.in_proj_b.weight": linear(R, D),
                "linear_attn.in_proj_a.weight": linear(R, D),
                "linear_attn.conv1d.weight": normal(2 * keys + values, 1, 4),
                "linear_attn.A_log": np.log(rng.uniform(0.05, 4, R)).astype(np.float32),
                "linear_attn.dt_bias": normal(R),
                "linear_attn.norm.weight": 1 + normal(config["linear_value_head_dim"], scale=0.2),
                "linear_attn.out_proj.weight": linear(D, values),
            }
        mlps = {"mlp.": F}
        if "num_experts" in config:
            mixer |= {
                "mlp.gate.weight": linear(config["num_experts"], D),
                "mlp.shared_expert_gate.weight": linear(1, D),
            }
            width = config["moe_intermediate_size"]
            mlps = {f"mlp.experts.{expert}.": width for expert in range(config["num_experts"])}
            mlps["mlp.shared_expert."] = config["shared_expert_intermediate_size"]
        for mlp, width in mlps.items():
            mixer |= {
                f"{mlp}gate_proj.weight": linear(width, D),
                f"{mlp}up_proj.weight": linear(width, D),
                f"{mlp}down_proj.weight": linear(D, width),
            }
        for norm in ("input_layernorm", "post_attention_layernorm"):
            mixer[f"{norm}.weight"] = normal(D, scale=0.2)
        weights |= {at + name: array for name, array in mixer.items()}
    return weights


def _nemotron(config: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A Nemotron-H, by its pattern of layers."""
    D, V, N, K = (
        config[key] for key in ("hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads")
    )
    H, heads, E = config["head_dim"], config["mamba_num_heads"], config["n_routed_experts"]
    inner, latent = heads * config["mamba_head_dim"], config["moe_latent_size"]
    channels = inner + 2 * config["n_groups"] * config["ssm_state_size"]
    attention = {"q": (N * H, D), "k": (K * H, D), "v": (K * H, D), "o": (D, N * H)}
    widths = {f"experts.{expert}.": (config["moe_intermediate_size"], latent or D) for expert in range(E)}
    widths["shared_experts."] = config["moe_shared_expert_intermediate_size"], D
    mixture: dict[str, tuple[int, ...]] = {"gate.weight": (E, D), "gate.e_score_correction_bias": (E,)}
    if latent:
        mixture |= {"fc1_latent_proj.weight": (latent, D), "fc2_latent_proj.weight": (D, latent)}
    for name, (width, into) in widths.items():
        mixture |= {f"{name}up_proj.weight": (width, into), f"{name}down_proj.weight": (into, width)}
    F = config["intermediate_size"]
    sizes: dict[str, dict[str, tuple[int, ...]]] = {
        "M": {
            "in_proj.weight": (inner + channels + heads, D),
            "conv1d.weight": (channels, 1, config.get("conv_kernel", 4)),
            "conv1d.bias": (channels,),
            "A_log": (heads,),
            "D": (heads,),
            "dt_bias": (heads,),
            "norm.weight": (inner,),
            "out_proj.weight": (D, inner),
        },
        "*": {f"{name}_proj.weight": size for name, size in attention.items()},
        "-": {"up_proj.weight": (F, D), "down_proj.weight": (D, F)},
        "E": mixture,
    }

    def made(name: str, size: tuple[int, ...]) -> np.ndarray:
        x = rng.standard_normal(size)
        if name.endswith("A_log"):
            x = np.log(rng.uniform(0.05, 4, size))
        elif name.endswith("dt_bias"):
            x -= 2
        elif len(size) == 2 and "embeddings" not in name:
            x /= np.sqrt(size[1])
        elif len(size) == 1:
            x = 1 + 0.2 * x if "norm" in name else 0.3 * x
        return x.astype(np.float32)

    named: dict[str, tuple[int, ...]] = {"backbone.embeddings.weight": (V, D)}
    for layer, letter in enumerate(config["hybrid_override_pattern"]):
        named[f"backbone.layers.{layer}.norm.weight"] = (D,)
        named |= {f"backbone.layers.{layer}.mixer.{name}": size for name, size in sizes[letter].items()}
    named |= {"backbone.norm_f.weight": (D,), "lm_head.weight": (V, D)}
    return {name: made(name, size) for name, size in named.items()}


def _sandwiched(weights: dict[str, np.ndarray], norm: Callable[[int], np.ndarray]) -> dict[str, np.ndarray]:
    """Add the norms around the MLP. Those of Gemma are near 0, not 1, in the files."""
    for name in [name for name in weights if name.endswith(".post_attention_layernorm.weight")]:
        for place in ("pre", "post"):
            added = name.replace("post_attention", f"{place}_feedforward")
            weights[added] = norm(len(weights[name]))
    return {name: array - 1 if "norm" in name else array for name, array in weights.items()}


def _fused(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Join q, k and v, and gate and up, into one matrix each."""
    joined: dict[str, list[np.ndarray]] = {}
    names = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj")
    names |= dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj")
    for name, array in weights.items():
        *parents, module, kind = name.split(".")
        joined.setdefault(".".join([*parents, names.get(module, module), kind]), []).append(array)
    return {name: np.concatenate(arrays) for name, arrays in joined.items()}


def _deepseek_layer(rng: np.random.Generator, at: str, config: dict, layer: int) -> dict[str, np.ndarray]:
    """A layer of DeepSeek-V3; it replaces what other families have."""
    D, N, E = config["hidden_size"], config["num_attention_heads"], config["n_routed_experts"]
    Q, C = config["q_lora_rank"], config["kv_lora_rank"]
    plain, turned, value = (config[f"{name}_head_dim"] for name in ("qk_nope", "qk_rope", "v"))
    sizes: dict[str, tuple[int, ...]] = {
        "self_attn.kv_a_proj_with_mqa.weight": (C + turned, D),
        "self_attn.kv_a_layernorm.weight": (C,),
        "self_attn.kv_b_proj.weight": (N * (plain + value), C),
        "self_attn.o_proj.weight": (D, N * value),
        "input_layernorm.weight": (D,),
        "post_attention_layernorm.weight": (D,),
    }
    if Q is None:
        sizes["self_attn.q_proj.weight"] = (N * (plain + turned), D)
    else:
        sizes["self_attn.q_a_proj.weight"] = (Q, D)
        sizes["self_attn.q_a_layernorm.weight"] = (Q,)
        sizes["self_attn.q_b_proj.weight"] = (N * (plain + turned), Q)
    F = config["moe_intermediate_size"]
    mlps = {f"mlp.experts.{expert}.": F for expert in range(E)}
    mlps["mlp.shared_experts."] = F * config["n_shared_experts"]
    if layer < config["first_k_dense_replace"]:
        mlps = {"mlp.": config["intermediate_size"]}
    else:
        sizes |= {"mlp.gate.weight": (E, D), "mlp.gate.e_score_correction_bias": (E,)}
    for mlp, width in mlps.items():
        sizes |= {f"{mlp}{name}_proj.weight": (width, D) for name in ("gate", "up")}
        sizes[f"{mlp}down_proj.weight"] = (D, width)

    def made(name: str, size: tuple[int, ...]) -> np.ndarray:
        x = rng.standard_normal(size)
        if len(size) == 2:
            return x / np.sqrt(size[1])
        return 1 + 0.2 * x if "norm" in name else 0.3 * x

    return {at + name: made(name, size).astype(np.float32) for name, size in sizes.items()}


def _gpt_oss_layer(rng: np.random.Generator, at: str, config: dict) -> dict[str, np.ndarray]:
    """Return the tensors of a gpt-oss layer beside attention's matrices and norms."""
    D, F, E = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    N, K, H = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    sizes = {
        **{f"{at}self_attn.{name}_proj.bias": (n * H,) for name, n in (("q", N), ("k", K), ("v", K))},
        f"{at}self_attn.o_proj.bias": (D,),
        f"{at}self_attn.sinks": (N,),
        f"{at}mlp.router.weight": (E, D),
        f"{at}mlp.router.bias": (E,),
        f"{at}mlp.experts.gate_up_proj": (E, D, 2 * F),
        f"{at}mlp.experts.gate_up_proj_bias": (E, 2 * F),
        f"{at}mlp.experts.down_proj": (E, F, D),
        f"{at}mlp.experts.down_proj_bias": (E, D),
    }
    scales = {3: D**-0.5, 2: 0.3, 1: 0.3}
    return {
        name: (scales[len(size)] * rng.standard_normal(size)).astype(np.float32)
        for name, size in sizes.items()
    }


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer (any text round-trips) trained on a few sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "the tinsmith makes what the tinker mends with; a user asks and an assistant answers. " * 4
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": EOS,
            "unk_token": SPECIAL_TOKENS[0],
            "clean_up_tokenization_spaces": False,
            "model_max_length": 512,
            "chat_template": _CHAT_TEMPLATE,
        },
    )


def _write_weights(folder: Path, weights: dict[str, np.ndarray], shards: int, dtype: str) -> None:
    kind = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    weights = {name: w.astype(kind) for name, w in weights.items()}
    metadata = {"format": "pt"}
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata)
        return
    names = sorted(weights)
    files = {f"model-{i + 1:05d}-of-{shards:05d}.safetensors": names[i::shards] for i in range(shards)}
    for file, held in files.items():
        save_file({name: weights[name] for name in held}, folder / file, metadata)
    _write_json(
        folder / "model.safetensors.index.json",
        {
            "metadata": {"total_size": sum(w.nbytes for w in weights.values())},
            "weight_map": {name: file for file, held in files.items() for name in held},
        },
    )


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2))
