"""Compares training of mixtures of experts with transformers + PEFT on torch, and two numbers of experts.

    python bench/mixtures.py                            # Qwen3-MoE's shape, 16 and 64 experts, 4 per token
    python bench/mixtures.py --experts 8 32 --json mixtures.json

A step is the forward and backward of a batch and one AdamW step, on the same sequences for all sides, which
take turns (see train.py). The models differ in the number of experts alone, so a token passes equally many
parameters. PEFT trains the larger one, at its best: sorted into micro-batches of 4, sdpa, logits only at real
tokens. It has adapters on the same matrices (`target_parameters` for the stacked experts), but all of its
factors are each expert's own, while ours share those at the hidden size.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from train import Side

SHAPE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 16384,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "moe_intermediate_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, nargs=2, default=[16, 64], metavar=("FEW", "MANY"))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8, help="sequences per step")
    parser.add_argument("--lengths", type=int, nargs=2, default=[400, 512], metavar=("FROM", "TO"))
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each side, after a warm-up")
    parser.add_argument(
        "--peft-python", default=sys.executable, help="a Python interpreter with torch and PEFT"
    )
    parser.add_argument("--micro-batch-tokens", type=int, help="ours")
    parser.add_argument("--json", type=Path, help="write all numbers to this JSON file")
    return parser.parse_args()


def write_random_model(folder: Path, experts: int) -> Path:
    """Write a model with random float32 weights."""
    from safetensors.numpy import save_file

    c, rng = SHAPE | {"num_experts": experts}, np.random.default_rng(0)
    D, F, V, H = (c[key] for key in ("hidden_size", "moe_intermediate_size", "vocab_size", "head_dim"))
    Q, K = c["num_attention_heads"] * H, c["num_key_value_heads"] * H

    def matrix(out: int, into: int) -> np.ndarray:
        return rng.standard_normal((out, into), np.float32) * 0.02

    weights = {"model.embed_tokens.weight": matrix(V, D), "lm_head.weight": matrix(V, D)}
    weights["model.norm.weight"] = np.ones(D, np.float32)
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        norms = ("input_layernorm", D), ("post_attention_layernorm", D)
        heads = ("self_attn.q_norm", H), ("self_attn.k_norm", H)
        weights |= {f"{at}{name}.weight": np.ones(size, np.float32) for name, size in (*norms, *heads)}
        sides = {"q_proj": (Q, D), "k_proj": (K, D), "v_proj": (K, D), "o_proj": (D, Q)}
        weights |= {f"{at}self_attn.{name}.weight": matrix(*shape) for name, shape in sides.items()}
        weights[f"{at}mlp.gate.weight"] = matrix(experts, D)
        for expert in range(experts):
            of_expert = f"{at}mlp.experts.{expert}."
            for name, shape in {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}.items():
                weights[f"{of_expert}{name}.weight"] = matrix(*shape)
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(c))
    return folder


def measure(arguments: argparse.Namespace, scratch: Path) -> dict:
    few, many = arguments.experts
    models = {count: write_random_model(scratch / str(count), count) for count in (few, many)}
    settings = {
        "dtype": "float32",
        "rank": arguments.rank,
        "train_unembed": False,
        "remat": None,
        "micro_batch_tokens": arguments.micro_batch_tokens,
        "warm_up": False,  # the first step compiles what the batches need
    }
    peft = {"padded": False, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    sides = {
        f"tinsmith, {count} experts": Side(
            sys.executable, "train_tinsmith.py", settings | {"model": str(models[count])}
        )
        for count in (few, many)
    }
    sides[f"PEFT, {many} experts"] = Side(
        arguments.peft_python,
        "train_peft.py",
        settings | peft | {"model": str(models[many]), "target_parameters": EXPERTS},
    )
    rng = np.random.default_rng(0)
    steps = []
    for step in range(arguments.steps + 1):
        low, high = arguments.lengths
        lengths = rng.integers(low, high + 1, arguments.batch)
        sequences = [rng.integers(0, SHAPE["vocab_size"], int(length) + 1).tolist() for length in lengths]
        answers = {name: side.ask({"sequences": sequences}) for name, side in sides.items()}
        steps.append({"lengths": lengths.tolist(), "warm_up": step == 0, "sides": answers})
        seconds = ", ".join(
            f"{name} {a['seconds']:.1f} s ({a['cpu_seconds']:.1f} of processors)"
            for name, a in answers.items()
        )
        print(f"step {step}: {seconds}", file=sys.stderr, flush=True)
    for side in sides.values():
        side.close()
    return {"settings": settings | {"experts": arguments.experts}, "steps": steps}


def show(result: dict) -> None:
    measured = [step for step in result["steps"] if not step["warm_up"]]
    tokens = [sum(step["lengths"]) for step in measured]
    table = Table(
        title=f"{SHAPE['num_experts_per_tok']} experts per token, rank {result['settings']['rank']}"
    )
    for column in ("", "tok/s", "tok/cpu-s", "peak MB"):
        table.add_column(column, justify="right" if column else "left")
    summary = {}
    for name in result["steps"][0]["sides"]:
        answers = [step["sides"][name] for step in measured]
        summary[name] = {
            "tokens_per_second": statistics.median(
                t / a["seconds"] for t, a in zip(tokens, answers, strict=True)
            ),
            "tokens_per_cpu_second": sum(tokens) / sum(a["cpu_seconds"] for a in answers),
            "peak_mb": max(a["peak_mb"] for a in answers),
        }
        table.add_row(name, *(f"{value:.0f}" for value in summary[name].values()))
    result["summary"] = summary
    console = Console()
    console.print(table)
    few, many, peft = summary.values()
    for unit in ("tokens_per_second", "tokens_per_cpu_second"):
        beside, cost = many[unit] / peft[unit], few[unit] / many[unit]
        console.print(f"{unit}: tinsmith / PEFT {beside:.2f}, few experts / many {cost:.2f}")


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(arguments, Path(scratch))
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
