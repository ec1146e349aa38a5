"""The official registry's models: real sizes of those that run here, and published LoRA counts.

The counts are those of `tinker_cookbook.hyperparam_utils` 0.6.1, per rank. `python tests/model/lineup.py`
writes the table of docs/compatibility.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinsmith.model.counts import adapter_counts
from tinsmith.model.families import FAMILIES

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
BEGIN, END = "<!-- lineup: written by tests/model/lineup.py -->\n", "<!-- end of lineup -->\n"

# attn, mlp, unembed
PUBLISHED: dict[str, tuple[int, int, int]] = {
    "Qwen/Qwen3-235B-A22B-Instruct-2507": (3_176_448, 56_598_528, 156_032),
    "Qwen/Qwen3-30B-A3B": (835_584, 14_450_688, 153_984),
    "Qwen/Qwen3-30B-A3B-Base": (835_584, 14_450_688, 153_984),
    "Qwen/Qwen3-30B-A3B-Instruct-2507": (835_584, 14_450_688, 153_984),
    "Qwen/Qwen3-32B": (2_490_368, 5_898_240, 157_056),
    "Qwen/Qwen3-4B-Instruct-2507": (737_280, 1_327_104, 154_496),
    "Qwen/Qwen3-8B": (958_464, 1_769_472, 156_032),
    "Qwen/Qwen3-8B-Base": (958_464, 1_769_472, 156_032),
    "Qwen/Qwen3-VL-235B-A22B-Instruct": (3_176_448, 56_598_528, 156_032),
    "Qwen/Qwen3-VL-30B-A3B-Instruct": (835_584, 14_450_688, 153_984),
    "Qwen/Qwen3.5-27B": (2_965_504, 4_325_376, 253_440),
    "Qwen/Qwen3.5-35B-A3B": (1_013_760, 16_281_600, 250_368),
    "Qwen/Qwen3.5-35B-A3B-Base": (1_013_760, 16_281_600, 250_368),
    "Qwen/Qwen3.5-397B-A17B": (2_841_600, 96_030_720, 252_416),
    "Qwen/Qwen3.5-4B": (897_024, 1_130_496, 250_880),
    "Qwen/Qwen3.5-9B": (1_130_496, 1_572_864, 252_416),
    "Qwen/Qwen3.5-9B-Base": (1_130_496, 1_572_864, 252_416),
    "Qwen/Qwen3.6-27B": (2_965_504, 4_325_376, 253_440),
    "Qwen/Qwen3.6-35B-A3B": (1_013_760, 16_281_600, 250_368),
    "Qwen/Qwen3.8-27B": (2_965_504, 4_325_376, 253_440),
    "deepseek-ai/DeepSeek-V3.1": (2_440_000, 94_307_328, 136_448),
    "deepseek-ai/DeepSeek-V3.1-Base": (2_440_000, 94_307_328, 136_448),
    "deepseek-ai/DeepSeek-V4.1-Flash": (1_013_760, 107_673_600, 134_400),
    "deepseek-ai/DeepSeek-V4.1-Flash-1017": (1_013_760, 107_673_600, 134_400),
    "meta-llama/Llama-3.1-70B": (4_096_000, 8_847_360, 136_448),
    "meta-llama/Llama-3.1-8B": (851_968, 1_769_472, 132_352),
    "meta-llama/Llama-3.1-8B-Instruct": (851_968, 1_769_472, 132_352),
    "meta-llama/Llama-3.2-1B": (212_992, 491_520, 130_304),
    "meta-llama/Llama-3.2-3B": (573_440, 946_176, 131_328),
    "meta-llama/Llama-3.3-70B-Instruct": (4_096_000, 8_847_360, 136_448),
    "moonshotai/Kimi-K2-Thinking": (1_940_288, 144_583_680, 171_008),
    "moonshotai/Kimi-K2.5": (1_940_288, 144_583_680, 171_008),
    "moonshotai/Kimi-K2.6": (1_940_288, 144_583_680, 171_008),
    "moonshotai/Kimi-K3.1-Pro": (8_040_960, 766_457_856, 171_008),
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": (584_832, 11_346_176, 133_760),
    "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16": (1_675_264, 111_349_760, 135_168),
    "nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16": (4_134_912, 254_529_536, 139_264),
    "nvidia/NVIDIA-Nemotron-3.5-Lightning-30B-A3B-BF16": (584_832, 11_346_176, 133_760),
    "nvidia/NVIDIA-Nemotron-3.5-Super-VL-120B-A12B-BF16": (1_675_264, 111_349_760, 135_168),
    "openai/gpt-oss-120b": (746_496, 40_124_160, 203_968),
    "openai/gpt-oss-20b": (497_664, 6_842_880, 203_968),
    "thinkingmachines/Inkling": (3_424_256, 154_705_920, 207_168),
    "thinkingmachines/Inkling-2-Small": (2_347_008, 128_065_536, 205_632),
    "thinkingmachines/Inkling-Small": (1_311_744, 64_503_808, 205_120),
    "zai-org/GLM-5.3": (2_920_320, 121_356_288, 161_024),
    "zai-org/GLM-5.3-Flash": (2_009_088, 75_755_520, 158_976),
}

NOT_YET = {
    "deepseek-ai/DeepSeek-V4": "deepseek_v4",
    "moonshotai/Kimi-K3": "kimi_k3",
    "thinkingmachines/": "inkling",
    "zai-org/GLM-5.3-Flash": "glm5_next",
    "zai-org/": "glm_moe_dsa",
}
"""The `model_type` of those that do not run, by the beginning of their names."""

OTHER_COUNTS = {"nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16": {"mlp": 254_607_360}}
"""Counts of ours that differ from the published ones. The published 254,529,536 is no multiple of 48, and the
model has 48 equal layers of experts."""


def _llama(layers: int, hidden: int, heads: int, width: int, head_dim: int = 128) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 128_256,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": head_dim,
        "intermediate_size": width,
    }


def _qwen3(layers: int, hidden: int, heads: int, width: int) -> dict[str, Any]:
    sizes = _llama(layers, hidden, heads, width)
    return sizes | {"model_type": "qwen3", "vocab_size": 151_936}


def _qwen3_moe(layers: int, hidden: int, heads: int, width: int) -> dict[str, Any]:
    return _qwen3(layers, hidden, heads, 6144) | {
        "model_type": "qwen3_moe",
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": width,
        "norm_topk_prob": True,
    }


def _gpt_oss(layers: int, experts: int) -> dict[str, Any]:
    return {"model_type": "gpt_oss", "num_hidden_layers": layers, "num_local_experts": experts}


def _of_sight(model_type: str, text: dict[str, Any]) -> dict[str, Any]:
    return {"model_type": model_type, "text_config": text}


_KIMI_K2 = {
    "model_type": "kimi_k2",
    "vocab_size": 163_840,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_routed_experts": 384,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.827,
}


def _qwen3_5(layers: int, hidden: int, heads: int, width: int, value_heads: int) -> dict[str, Any]:
    return {
        "model_type": "qwen3_5",
        "text_config": {
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "intermediate_size": width,
            "linear_num_value_heads": value_heads,
        },
    }


def _qwen3_5_moe(
    layers: int, hidden: int, heads: int, experts: tuple[int, int, int], value_heads: int
) -> dict[str, Any]:
    count, chosen, width = experts
    sizes = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "linear_num_value_heads": value_heads,
        "num_experts": count,
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": width,
    }
    return {"model_type": "qwen3_5_moe", "text_config": sizes}


def _nemotron(
    pattern: str, hidden: int, mamba_heads: int, experts: tuple[int, int, int], shared: int
) -> dict[str, Any]:
    count, chosen, width = experts
    return {
        "model_type": "nemotron_h",
        "hybrid_override_pattern": pattern,
        "hidden_size": hidden,
        "num_key_value_heads": 2,
        "mamba_num_heads": mamba_heads,
        "n_routed_experts": count,
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": width,
        "moe_shared_expert_intermediate_size": shared,
    }


_NEMOTRON_NANO = _nemotron("MEMEM*E" * 5 + "MEMEMEM*EMEMEMEME", 2688, 64, (128, 6, 1856), 3712)
_NEMOTRON_SUPER = _nemotron(
    "MEMEMEM*E" * 3 + "MEMEMEMEM*E" * 4 + "MEMEMEM*EMEMEMEME", 4096, 128, (512, 22, 2688), 5376
) | {"moe_latent_size": 1024}
_NEMOTRON_ULTRA = _nemotron(
    "MEMEMEM*" + ("EMEMEM*" + "EMEMEMEM*" * 2) * 3 + "EMEMEM*EMEMEMEM*EMEMEMEME",
    8192,
    256,
    (512, 22, 5120),
    10_240,
) | {"num_attention_heads": 64, "moe_latent_size": 2048}
_QWEN35_9B, _QWEN35_27B = _qwen3_5(32, 4096, 16, 12_288, 32), _qwen3_5(64, 5120, 24, 17_408, 48)
_QWEN35_35B = _qwen3_5_moe(40, 2048, 16, (256, 8, 512), 32)
_LLAMA_8B, _LLAMA_70B = _llama(32, 4096, 32, 14_336), _llama(80, 8192, 64, 28_672)
_QWEN3_8B, _QWEN3_30B = _qwen3(36, 4096, 32, 12_288), _qwen3_moe(48, 2048, 32, 768)
SIZES: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.2-1B": _llama(16, 2048, 32, 8192, 64),
    "meta-llama/Llama-3.2-3B": _llama(28, 3072, 24, 8192),
    "meta-llama/Llama-3.1-8B": _LLAMA_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_8B,
    "meta-llama/Llama-3.1-70B": _LLAMA_70B,
    "meta-llama/Llama-3.3-70B-Instruct": _LLAMA_70B,
    "Qwen/Qwen3-4B-Instruct-2507": _qwen3(36, 2560, 32, 9728),
    "Qwen/Qwen3-8B": _QWEN3_8B,
    "Qwen/Qwen3-8B-Base": _QWEN3_8B,
    "Qwen/Qwen3-32B": _qwen3(64, 5120, 64, 25_600),
    "Qwen/Qwen3-30B-A3B": _QWEN3_30B,
    "Qwen/Qwen3-30B-A3B-Base": _QWEN3_30B,
    "Qwen/Qwen3-30B-A3B-Instruct-2507": _QWEN3_30B,
    "deepseek-ai/DeepSeek-V3.1": {"model_type": "deepseek_v3"},
    "deepseek-ai/DeepSeek-V3.1-Base": {"model_type": "deepseek_v3"},
    "moonshotai/Kimi-K2-Thinking": _KIMI_K2,
    "moonshotai/Kimi-K2.5": _of_sight("kimi_k25", _KIMI_K2),
    "moonshotai/Kimi-K2.6": _of_sight("kimi_k25", _KIMI_K2),
    "Qwen/Qwen3-VL-30B-A3B-Instruct": _of_sight("qwen3_vl_moe", _QWEN3_30B),
    "Qwen/Qwen3-VL-235B-A22B-Instruct": _of_sight("qwen3_vl_moe", _qwen3_moe(94, 4096, 64, 1536)),
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": _NEMOTRON_NANO,
    "nvidia/NVIDIA-Nemotron-3.5-Lightning-30B-A3B-BF16": _NEMOTRON_NANO,
    "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16": _NEMOTRON_SUPER,
    "nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16": _NEMOTRON_ULTRA,
    "nvidia/NVIDIA-Nemotron-3.5-Super-VL-120B-A12B-BF16": _of_sight("nemotron_h_omni", _NEMOTRON_SUPER),
    "openai/gpt-oss-20b": _gpt_oss(24, 32),
    "openai/gpt-oss-120b": _gpt_oss(36, 128),
    "Qwen/Qwen3-235B-A22B-Instruct-2507": _qwen3_moe(94, 4096, 64, 1536),
    "Qwen/Qwen3.5-4B": _qwen3_5(32, 2560, 16, 9216, 32),
    "Qwen/Qwen3.5-9B": _QWEN35_9B,
    "Qwen/Qwen3.5-9B-Base": _QWEN35_9B,
    "Qwen/Qwen3.5-27B": _QWEN35_27B,
    "Qwen/Qwen3.6-27B": _QWEN35_27B,
    "Qwen/Qwen3.8-27B": _QWEN35_27B,
    "Qwen/Qwen3.5-35B-A3B": _QWEN35_35B,
    "Qwen/Qwen3.5-35B-A3B-Base": _QWEN35_35B,
    "Qwen/Qwen3.6-35B-A3B": _QWEN35_35B,
    "Qwen/Qwen3.5-397B-A17B": _qwen3_5_moe(60, 4096, 32, (512, 10, 1024), 64),
}
"""What config.json says of the sizes, for the models that run here."""


PARTS = ("attn", "mlp", "unembed")


def counted(name: str) -> tuple[int, int, int]:
    """Return our numbers of LoRA parameters per rank: attn, mlp, unembed."""
    hf = SIZES[name]
    found = adapter_counts(FAMILIES[hf["model_type"]].read(hf), 1)
    attn, mlp, unembed = (found[part] for part in PARTS)
    return attn, mlp, unembed


def table() -> str:
    """Return the table of the documents."""
    lines = ["| model | `model_type` | attn | mlp | unembed |", "|---|---|---|---|---|"]
    for name in PUBLISHED:
        if name in SIZES:
            cells = [f"`{SIZES[name]['model_type']}`"]
            for ours, published in zip(counted(name), PUBLISHED[name], strict=True):
                cells.append(f"{ours:,}" + (f" (published: {published:,})" if ours != published else ""))
        else:
            family = next(family for start, family in NOT_YET.items() if name.startswith(start))
            cells = [f"`{family}`: does not run", "", "", ""]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """Return the page with the table as it should be."""
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page())
