"""Measures the seconds of a whole RL step through the SDK against a real server, by phase.

    python bench/rl_step.py                               # a tiny random model
    python bench/rl_step.py --model smollm2-135m --steps 5 --json rl_step.json

A step has three phases. `sample`: sample a group for each prompt from the newest weights. `train`: train on
all of them with importance_sampling and one optim_step, submitted together. `sync`:
save_weights_and_get_sampling_client. `device` is the engine's time on the accelerator for the phase, from the
ledger. `to first token` is the extra time that an unnamed save takes until the first token of the new
weights, compared with a sample of one token on the old ones; both have uncached prompts of the same length.
All are medians over the steps; the first steps, which compile, are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sqlite3
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import tinker
from latency import ROOT, start
from rich.console import Console
from rich.table import Table
from tinker import types

PHASES = {
    "sample": ("sample",),
    "train": ("forward_backward", "optim_step"),
    "sync": ("save_unnamed_sampler",),
}


class RLSteps:
    """One training client and its samplers. `seconds` has the time of each step, by phase."""

    def __init__(self, url: str, arguments: argparse.Namespace):
        self._arguments = arguments
        self._random = np.random.default_rng(0)
        service = tinker.ServiceClient(base_url=url, api_key="tml-bench")
        self._training = service.create_lora_training_client(base_model="base", rank=arguments.rank).result()
        self._sampler = self._training.save_weights_and_get_sampling_client().result()
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        self.began: list[float] = []

    def run(self) -> None:
        self.began.append(time.time())
        step_began = time.perf_counter()
        data = self._timed("sample", self._sample)
        self._timed("train", lambda: self._train(data))
        self._timed("sync", self._sync)
        self.seconds["step"].append(time.perf_counter() - step_began)

    def first_token(self) -> None:
        """Return the time to a new sampler's first token, less that of a sampler that has sampled before."""
        self._one_token()
        usual = self._seconds_of(self._one_token)
        fresh = self._seconds_of(lambda: (self._sync(), self._one_token()))
        self.seconds["to first token"].append(fresh - usual)

    def _sample(self) -> list[types.Datum]:
        asked = self._arguments
        params = types.SamplingParams(max_tokens=asked.new_tokens, stop=[])
        groups = [self._prompt() for _ in range(asked.prompts)]
        futures = [
            self._sampler.sample(types.ModelInput.from_ints(prompt), asked.group, params) for prompt in groups
        ]
        return [
            _datum(prompt, sequence, advantage=1.0 if index % 2 else -1.0)
            for prompt, future in zip(groups, futures, strict=True)
            for index, sequence in enumerate(future.result().sequences)
        ]

    def _train(self, data: list[types.Datum]) -> None:
        output = self._training.forward_backward(data, "importance_sampling")
        update = self._training.optim_step(types.AdamParams(learning_rate=1e-5))
        output.result()
        update.result()

    def _sync(self) -> None:
        self._sampler = self._training.save_weights_and_get_sampling_client().result()

    def _one_token(self) -> None:
        params = types.SamplingParams(max_tokens=1)
        self._sampler.sample(types.ModelInput.from_ints(self._prompt()), 1, params).result()

    def _prompt(self) -> list[int]:
        return self._random.integers(5, 300, self._arguments.prompt_tokens).tolist()

    def _timed(self, phase: str, work):
        began = time.perf_counter()
        result = work()
        self.seconds[phase].append(time.perf_counter() - began)
        return result

    def _seconds_of(self, work) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began


def _datum(prompt: list[int], sequence: types.SampledSequence, advantage: float) -> types.Datum:
    unscored = len(prompt) - 1
    return types.Datum(
        model_input=types.ModelInput.from_ints(prompt + sequence.tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": prompt[1:] + sequence.tokens,
            "logprobs": [0.0] * unscored + sequence.logprobs,
            "advantages": [0.0] * unscored + [advantage] * len(sequence.tokens),
        },
    )


def device_seconds(data_dir: Path, began: list[float]) -> dict[str, list[float]]:
    """Return the time on the device of each phase's operations, step by step."""
    ledger = sqlite3.connect(data_dir / "ledger.db")
    rows = ledger.execute("SELECT kind, accepted_at, device_seconds FROM operations").fetchall()
    ledger.close()
    ends = [*began[1:], float("inf")]
    return {
        phase: [
            sum(held or 0.0 for kind, at, held in rows if kind in kinds and begin <= at < end)
            for begin, end in zip(began, ends, strict=True)
        ]
        for phase, kinds in PHASES.items()
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="a folder, a hub id or smollm2-135m (default: a tiny random model)")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8, help="samples per prompt")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--warm-up", type=int, default=2, help="steps before the measured ones")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument(
        "--syncs", type=int, default=9, help="how often to measure a new sampler's first token"
    )
    parser.add_argument("--json", type=Path, help="also write the numbers to this JSON file")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory() as directory:
        model = arguments.model
        if model is None:
            sys.path.insert(0, str(ROOT / "tests"))
            from tiny_models import write_model

            model = str(write_model(Path(directory) / "tiny", "llama"))
        data_dir = Path(directory) / "data"
        server, url = start(model, data_dir)
        try:
            steps = RLSteps(url, arguments)
            count = arguments.warm_up + arguments.steps
            for number in range(1, count + 1):
                steps.run()
                took = ", ".join(f"{phase} {seconds[-1]:.1f} s" for phase, seconds in steps.seconds.items())
                print(f"step {number} of {count}: {took}", file=sys.stderr, flush=True)
            steps.began.append(time.time())  # operations after this belong to no step
            for _ in range(1 + arguments.syncs):
                steps.first_token()
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(120)
        device = device_seconds(data_dir, steps.began)
    report(arguments, steps.seconds, device)


def report(
    arguments: argparse.Namespace, seconds: dict[str, list[float]], device: dict[str, list[float]]
) -> None:
    sampled = arguments.prompts * arguments.group * arguments.new_tokens
    trained = sampled + arguments.prompts * arguments.group * (arguments.prompt_tokens - 1)
    tokens = {"sample": sampled, "train": trained}
    measured = slice(arguments.warm_up, arguments.warm_up + arguments.steps)
    table = Table(title=f"{arguments.prompts} x {arguments.group} x {arguments.new_tokens} tokens")
    for column in ("phase", "s", "device s", "tok/s"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    numbers: dict[str, dict[str, float]] = {}
    for phase in (*PHASES, "step"):
        wall = statistics.median(seconds[phase][measured])
        numbers[phase] = {"s": wall}
        if phase in device:
            numbers[phase]["device_s"] = statistics.median(device[phase][measured])
        if phase in tokens:
            numbers[phase]["tokens_per_s"] = tokens[phase] / wall
        values = (numbers[phase].get(name) for name in ("s", "device_s", "tokens_per_s"))
        table.add_row(phase, *("" if value is None else f"{value:.3g}" for value in values))
    first = statistics.median(seconds["to first token"][1:])
    numbers["to_first_token"] = {"s": first}
    table.add_row("to first token", f"{first:.3g}", "", "")
    Console().print(table)
    result = {
        "model": arguments.model or "tiny",
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "compiling_step_s": seconds["step"][0],
        "phases": numbers,
    }
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
