"""Compares training speed and memory with transformers + PEFT on torch: same sequences, alternating steps.

    python bench/train.py                                   # SmolLM2's shape, random weights
    python bench/train.py --model FOLDER --dtype bfloat16 --steps 5 --json train.json
    python bench/train.py --peft-python OTHER/bin/python    # torch in an environment of its own

A step is the forward and backward of the batch and one AdamW step. PEFT runs in two ways: on the batch padded
to its longest sequence, and at its best (sorted by length into micro-batches of 4, sdpa, logits only at real
tokens). Each side runs in a separate process with the allocator settings that the server gives the engine,
which speed up torch too. `tok/s` counts real tokens. `tok/cpu-s` divides by processor time instead, which
other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from tinsmith.server.supervision.engine_process import engine_environment

HERE = Path(__file__).parent
SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
SIDES = ("tinsmith", "peft best", "peft padded")


class Side:
    """A process that trains on request: a line of JSON in, a line of JSON out."""

    def __init__(self, python: str, script: str, settings: dict):
        # torch's threads must not spin while another side works; all have the engine's allocator settings
        environment = engine_environment() | {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
        self._process = subprocess.Popen(
            [python, str(HERE / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.hello = self.ask(settings)

    def ask(self, question: dict) -> dict:
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise SystemExit(f"{self._process.args[1]} ended with {self._process.wait()} (-9: out of memory)")
        return json.loads(answer)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def main(
    arguments: argparse.Namespace,
    measure: Callable[[argparse.Namespace, Path, str], dict],
    show: Callable[[dict], None],
) -> None:
    """Measure in every dtype, show the results, and write them where `--json` says."""
    with tempfile.TemporaryDirectory() as scratch:
        model = arguments.model or write_random_model(Path(scratch))
        results = [measure(arguments, model, dtype) for dtype in arguments.dtype]
    for result in results:
        show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=Path, help="a Hugging Face folder (default: SmolLM2-135M's shape, random)"
    )
    parser.add_argument(
        "--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"]
    )
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--train-unembed", action="store_true")
    parser.add_argument("--batch", type=int, default=16, help="sequences per step")
    parser.add_argument("--lengths", type=int, nargs=2, default=[64, 512], metavar=("FROM", "TO"))
    parser.add_argument(
        "--steps", type=int, default=3, help="measured steps of each side, after one warm-up step"
    )
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES)
    parser.add_argument(
        "--remat", choices=["none", "dots", "full"], help="Tinsmith only: what the backward recomputes"
    )
    parser.add_argument("--micro-batch-tokens", type=int, help="ours")
    parser.add_argument("--python", default=sys.executable, help="a Python interpreter with tinsmith")
    parser.add_argument(
        "--peft-python", default=sys.executable, help="a Python interpreter with torch and PEFT"
    )
    parser.add_argument("--json", type=Path, help="write all numbers to this JSON file")
    return parser.parse_args()


def measure(arguments: argparse.Namespace, model: Path, dtype: str) -> dict:
    settings = {
        "model": str(model),
        "dtype": dtype,
        "rank": arguments.rank,
        "train_unembed": arguments.train_unembed,
        "remat": arguments.remat,
        "micro_batch_tokens": arguments.micro_batch_tokens,
    }
    sides = {}
    if "tinsmith" in arguments.sides:
        sides["tinsmith"] = Side(arguments.python, "train_tinsmith.py", settings)
    for name in ("peft best", "peft padded"):
        if name in arguments.sides:
            sides[name] = Side(
                arguments.peft_python, "train_peft.py", settings | {"padded": name == "peft padded"}
            )
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    rng = np.random.default_rng(0)
    steps = []
    for step in range(arguments.steps + 1):
        low, high = arguments.lengths
        lengths = rng.integers(low, high + 1, arguments.batch)
        sequences = [rng.integers(0, vocab, int(length) + 1).tolist() for length in lengths]
        answers = {name: side.ask({"sequences": sequences}) for name, side in sides.items()}
        steps.append({"lengths": lengths.tolist(), "warm_up": step == 0, "sides": answers})
        losses = ", ".join(f"{name} {a['loss']:.4f} in {a['seconds']:.1f} s" for name, a in answers.items())
        print(f"{dtype} step {step}: loss per token {losses}", file=sys.stderr, flush=True)
    for side in sides.values():
        side.close()
    return {"settings": settings | {"lengths": arguments.lengths, "batch": arguments.batch}, "steps": steps}


def show(result: dict) -> None:
    measured = [step for step in result["steps"] if not step["warm_up"]]
    settings = result["settings"]
    low, high = settings["lengths"]
    batch = f"{settings['batch']} sequences of {low} to {high} tokens"
    title = f"{settings['dtype']}, rank {settings['rank']}, {batch}"
    table = Table(title=title)
    for column in ("", "tok/s", "tok/cpu-s", "optim s", "peak MB", "computed/real", "programs", "compile s"):
        table.add_column(column, justify="right" if column else "left")
    summary = {}

    def rate(tokens: int, answer: dict) -> float:
        return tokens / answer["seconds"]

    for name in result["steps"][0]["sides"]:
        answers = [step["sides"][name] for step in measured]
        tokens = [sum(step["lengths"]) for step in measured]
        summary[name] = {
            "tokens_per_second": statistics.median(map(rate, tokens, answers)),
            "tokens_per_cpu_second": sum(tokens) / sum(a["cpu_seconds"] for a in answers),
            "optim_seconds": statistics.median(a["optim_seconds"] for a in answers),
            "peak_mb": max(a["peak_mb"] for a in answers),
            "computed_per_real": sum(a["computed_tokens"] for a in answers) / sum(tokens),
            "programs": answers[-1].get("programs", 0),
            "compile_seconds": result["steps"][0]["sides"][name].get("compile_seconds", 0.0),
        }
        s = summary[name]
        table.add_row(
            name,
            f"{s['tokens_per_second']:.0f}",
            f"{s['tokens_per_cpu_second']:.0f}",
            f"{s['optim_seconds']:.2f}",
            f"{s['peak_mb']:.0f}",
            f"{s['computed_per_real']:.2f}",
            str(s["programs"]),
            f"{s['compile_seconds']:.0f}",
        )
    result["summary"] = summary
    console = Console()
    console.print(table)
    for name in summary:
        if name != "tinsmith" and "tinsmith" in summary:
            ours, theirs = summary["tinsmith"], summary[name]
            speed, cpu, memory = (
                ours[key] / theirs[key] for key in ("tokens_per_second", "tokens_per_cpu_second", "peak_mb")
            )
            console.print(
                f"tinsmith / {name}: {speed:.2f}x tok/s, {cpu:.2f}x tok/cpu-s, {memory:.2f}x memory"
            )


def write_random_model(folder: Path) -> Path:
    """Write a model of SmolLM2-135M's shape with random bfloat16 weights."""
    import ml_dtypes
    from safetensors.numpy import save_file

    c, rng = SMOLLM2_135M, np.random.default_rng(0)
    D, F, V = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    kv = D // c["num_attention_heads"] * c["num_key_value_heads"]

    def matrix(out: int, into: int) -> np.ndarray:
        return (rng.standard_normal((out, into), np.float32) * 0.02).astype(ml_dtypes.bfloat16)

    ones = np.ones(D, ml_dtypes.bfloat16)
    weights = {"model.embed_tokens.weight": matrix(V, D), "model.norm.weight": ones}
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        weights |= {
            f"{at}self_attn.q_proj.weight": matrix(D, D),
            f"{at}self_attn.k_proj.weight": matrix(kv, D),
            f"{at}self_attn.v_proj.weight": matrix(kv, D),
            f"{at}self_attn.o_proj.weight": matrix(D, D),
            f"{at}mlp.gate_proj.weight": matrix(F, D),
            f"{at}mlp.up_proj.weight": matrix(F, D),
            f"{at}mlp.down_proj.weight": matrix(D, F),
            f"{at}input_layernorm.weight": ones,
            f"{at}post_attention_layernorm.weight": ones,
        }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(c))
    return folder


if __name__ == "__main__":
    main(parse(), measure, show)
