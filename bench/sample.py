"""Compares sampling speed with transformers' generate, on the same prompts, with the sides taking turns.

    python bench/sample.py                                    # SmolLM2's shape, random weights
    python bench/sample.py --model FOLDER --dtype bfloat16 --batch 1 16 --json sample.json
    python bench/sample.py --sides tinsmith                   # where there is no torch

All requests of a batch arrive together, each with a different prompt, and sample at temperature 1 until the
length limit. Tinsmith gets separate requests to the embedded sampler, with an adapter (never merged) and
without one. transformers gets one padded batch, with PEFT's adapter unmerged and merged.

Prefill tok/s is prompt tokens over the time to all first tokens. For Tinsmith, the time between tokens is the
time of a decode chunk divided by its tokens. `limit` is the share of the speed that memory bandwidth allows:
the bytes per step (weights, keys and values of the context) over the bandwidth of a measured copy.
`tok/cpu-s` divides by processor time, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from train import Side, main

SIDES = ("tinsmith", "transformers unmerged", "transformers merged")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a Hugging Face folder (default: random weights)")
    parser.add_argument(
        "--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"]
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        default=64,
        help="the longest prompt; others have at least 3/4 of its length",
    )
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2, help="measured rounds, after one warm-up round")
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES)
    parser.add_argument("--python", default=sys.executable, help="a Python interpreter with tinsmith")
    parser.add_argument("--torch-python", default=sys.executable, help="a Python interpreter with torch")
    parser.add_argument("--json", type=Path, help="write all numbers to this JSON file")
    return parser.parse_args()


def measure(arguments: argparse.Namespace, model: Path, dtype: str) -> dict:
    longest = arguments.prompt_tokens + arguments.new_tokens
    settings = {
        "model": str(model),
        "dtype": dtype,
        "rank": arguments.rank,
        "kv_cache_tokens": 2 * max(arguments.batch) * (longest + 64),
    }
    sides: dict[str, tuple[Side, dict]] = {}
    if "tinsmith" in arguments.sides:
        ours = Side(arguments.python, "sample_tinsmith.py", settings)
        sides["tinsmith, adapter"], sides["tinsmith, base"] = (
            (ours, {"adapter": True}),
            (ours, {"adapter": False}),
        )
    for name in ("transformers unmerged", "transformers merged"):
        if name in arguments.sides:
            script = settings | {"merged": name == "transformers merged"}
            sides[name] = (Side(arguments.torch_python, "sample_transformers.py", script), {})
    machine = sides["tinsmith, adapter"][0].hello if "tinsmith, adapter" in sides else {}
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    rng = np.random.default_rng(0)

    def prompts(batch: int) -> list[list[int]]:
        lengths = rng.integers(3 * arguments.prompt_tokens // 4, arguments.prompt_tokens + 1, batch)
        return [rng.integers(0, vocab, int(length)).tolist() for length in lengths]

    rounds = []
    for batch in arguments.batch:
        for number in range(arguments.rounds + 1):
            question = {"prompts": prompts(batch), "new_tokens": arguments.new_tokens}
            question["other_prompts"] = [prompt[::-1] for prompt in question["prompts"]]
            answers = {name: side.ask(question | extra) for name, (side, extra) in sides.items()}
            tokens = sum(map(len, question["prompts"]))
            rounds.append({"batch": batch, "warm_up": number == 0, "prompt_tokens": tokens, "sides": answers})
            seconds = ", ".join(f"{name} {answer['seconds']:.1f} s" for name, answer in answers.items())
            print(f"{dtype} batch {batch} round {number}: {seconds}", file=sys.stderr, flush=True)
    for side in {side for side, _ in sides.values()}:
        side.close()
    settings |= {"new_tokens": arguments.new_tokens, "prompt_tokens": arguments.prompt_tokens}
    return {"settings": settings, "machine": machine, "rounds": rounds}


def summary(result: dict, batch: int, name: str) -> dict[str, float]:
    """Return the best measured round of one side at one batch size, since disturbances only slow it down."""
    rounds = [r for r in result["rounds"] if r["batch"] == batch and not r["warm_up"]]
    best = min(rounds, key=lambda r: r["sides"][name]["seconds"])
    answer, new = best["sides"][name], result["settings"]["new_tokens"]
    decode = batch * (new - 1) / answer["decode_seconds"]
    gaps = np.array(answer["gaps"]) * 1e3
    found = {
        "prefill_tokens_per_second": best["prompt_tokens"] / answer["prefill_seconds"],
        "decode_tokens_per_second": decode,
        "tokens_per_second": batch * new / answer["seconds"],
        "tokens_per_cpu_second": batch * new / answer["cpu_seconds"],
        "first_token_ms": answer["first_token_seconds"] * 1e3,
        "inter_token_p50_ms": float(np.percentile(gaps, 50)),
        "inter_token_p99_ms": float(np.percentile(gaps, 99)),
    }
    if machine := result["machine"]:
        context = best["prompt_tokens"] + batch * new / 2
        step_bytes = machine["weight_bytes"] + context * machine["kv_bytes_per_token"]
        found["bandwidth_limit_percent"] = 100 * decode * step_bytes / (batch * machine["bandwidth"])
    return found


COLUMNS = {
    "prefill_tokens_per_second": "prefill tok/s",
    "decode_tokens_per_second": "decode tok/s",
    "tokens_per_second": "tok/s",
    "tokens_per_cpu_second": "tok/cpu-s",
    "first_token_ms": "first ms",
    "inter_token_p50_ms": "p50 ms",
    "inter_token_p99_ms": "p99 ms",
    "bandwidth_limit_percent": "limit %",
}


def show(result: dict) -> None:
    settings, machine = result["settings"], result["machine"]
    lengths = f"prompts of up to {settings['prompt_tokens']}, {settings['new_tokens']} new tokens"
    title = f"{settings['dtype']}, {lengths}"
    if machine:
        title += f", copy bandwidth {machine['bandwidth'] / 1e9:.1f} GB/s"
    table = Table(title=title)
    table.add_column("batch", justify="right")
    table.add_column("")
    for column in COLUMNS.values():
        table.add_column(column, justify="right")
    result["summary"] = []
    for batch in sorted({r["batch"] for r in result["rounds"]}):
        for name in result["rounds"][0]["sides"]:
            found = summary(result, batch, name)
            result["summary"].append({"batch": batch, "side": name} | found)
            cells = [f"{found[key]:.1f}" if key in found else "" for key in COLUMNS]
            table.add_row(str(batch), name, *cells)
    Console(width=150).print(table)


if __name__ == "__main__":
    main(parse(), measure, show)
