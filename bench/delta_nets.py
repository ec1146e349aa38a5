"""Measures how long training takes with rows of delta nets as they get longer: `python bench/delta_nets.py`.

A step is the forward and backward of one datum that fills a row of its length, and one AdamW step. Models of
Qwen3.5's shape with eight layers take turns: six delta nets and two layers of full attention, and seven and
one. If each layer of a kind costs the same, what eight delta nets would cost follows from the two. All sides
recompute the same in the backward (`--remat`), which by default depends on the length of a row.
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

VOCABULARY, LAYERS = 2048, 8
MODELS = {2: "6 delta nets, 2 attention", 1: "7 delta nets, 1 attention"}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs=2, default=[2048, 4096], metavar=("SHORT", "LONG"))
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each side, after a warm-up")
    parser.add_argument("--remat", choices=["none", "dots", "attention", "full"], default="full")
    parser.add_argument("--json", type=Path, help="write all numbers to this JSON file")
    return parser.parse_args()


def write_random_model(folder: Path, attention: int, length: int) -> Path:
    """Write a model whose longest rows have this length, so that the packer has a row of it."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    config = Qwen3_5TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=LAYERS,
        layer_types=["linear_attention"] * (LAYERS - attention) + ["full_attention"] * attention,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=8,
        linear_num_value_heads=8,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        max_position_embeddings=length,
    )
    Qwen3_5ForCausalLM(config).save_pretrained(folder)
    return folder


def measure(arguments: argparse.Namespace, scratch: Path) -> dict:
    settings = {
        "dtype": "float32",
        "rank": arguments.rank,
        "train_unembed": False,
        "remat": arguments.remat,
        "micro_batch_tokens": None,
        "warm_up": False,  # the first step compiles what the datums need
    }
    sides = {}
    for attention in MODELS:
        for length in arguments.lengths:
            model = write_random_model(scratch / f"{attention}-{length}", attention, length)
            sides[attention, length] = Side(
                sys.executable, "train_tinsmith.py", settings | {"model": str(model)}
            )
    rng = np.random.default_rng(0)
    answers: dict[tuple[int, int], list[dict]] = {each: [] for each in sides}
    for step in range(arguments.steps + 1):
        for (attention, length), side in sides.items():
            answer = side.ask({"sequences": [rng.integers(0, VOCABULARY, length + 1).tolist()]})
            assert answer["computed_tokens"] == length, "the packer has no row of this length"
            if step:
                answers[attention, length].append(answer)
    for side in sides.values():
        side.close()
    return {"settings": settings, "lengths": arguments.lengths} | {
        unit: _by_model(answers, unit, arguments.lengths) for unit in ("seconds", "cpu_seconds")
    }


def _by_model(answers: dict[tuple[int, int], list[dict]], unit: str, lengths: list[int]) -> dict:
    """The medians of each model at each length, and what they say of delta nets alone."""
    rows = {
        name: [statistics.median(each[unit] for each in answers[attention, length]) for length in lengths]
        for attention, name in MODELS.items()
    }
    one, two = (rows[MODELS[attention]] for attention in (1, 2))
    return rows | {f"{LAYERS} delta nets (computed)": [2 * a - b for a, b in zip(one, two, strict=True)]}


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(arguments, Path(scratch))
    short, long = arguments.lengths
    for unit, called in (("seconds", "seconds"), ("cpu_seconds", "processor seconds")):
        table = Table(title=f"{called}, {LAYERS} layers, rank {arguments.rank}, float32")
        for column in ("", f"{short} tokens", f"{long} tokens", "ratio"):
            table.add_column(column, justify="right" if column else "left")
        for name, (first, last) in result[unit].items():
            table.add_row(name, f"{first:.2f}", f"{last:.2f}", f"{last / first:.2f}")
        Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
