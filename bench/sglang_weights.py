"""Measures the seconds from a save until SGLang samples the new weights, with real servers on the CPU.

    make sglang && python bench/sglang_weights.py --versions 5 --json sglang_weights.json

Each version is one training step, a named save and a token from SGLang. `save`: until the SDK has the path.
`load`: until SGLang lists the adapter, which it is told to load before any sample. `usable`: both together.
`first token`: from then on, by SGLang alone. All are medians without the first version, which compiles.
`difference`: the mean absolute difference between SGLang's and the trainer's log-probs of 32 tokens drawn by
SGLang.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import httpx
import numpy as np
import tinker
from latency import ROOT, start
from rich.console import Console
from rich.table import Table
from tinker import types
from tinsmith.server.base_models import resolve

sys.path.insert(0, str(ROOT / "tests"))
from sglang.sglang_process import LORA, SglangProcess

PHASES = ("save", "load", "usable", "first token")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--python", type=Path, default=ROOT / ".cache" / "sglang" / "venv" / "bin" / "python")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--versions", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = resolve(options.model, Path.home() / ".cache" / "tinsmith", None)
    with tempfile.TemporaryDirectory(prefix="tinsmith-bench-") as folder:
        log = Path(folder) / "sglang.log"
        sglang = SglangProcess(options.python, model.folder, log, *LORA).start()
        try:
            only = ("--sglang", f"base={sglang.url}", "--sampling-engine", "sglang")
            server, url = start(options.model, Path(folder) / "data", *only)
            try:
                seconds, differences = measured(url, sglang.url, options.rank, options.versions)
            finally:
                server.terminate()
                server.wait()
        finally:
            sglang.stop()
    medians = {phase: statistics.median(seconds[phase][1:]) for phase in PHASES}
    table = Table(title=f"{model.name}, rank {options.rank}, {options.versions} versions")
    for column in ("phase", "median s", "slowest s"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for phase in PHASES:
        table.add_row(phase, f"{medians[phase]:.3f}", f"{max(seconds[phase][1:]):.3f}")
    Console().print(table, f"difference: {statistics.mean(differences):.1e}, at most {max(differences):.1e}")
    if options.json:
        found = {"medians": medians, "all": seconds, "differences": differences}
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def measured(url: str, sglang: str, rank: int, versions: int) -> tuple[dict[str, list[float]], list[float]]:
    """Return the seconds of each phase and the difference of log-probs, by version."""
    service = tinker.ServiceClient(base_url=url, api_key="tml-bench")
    training = service.create_lora_training_client(base_model="base", rank=rank).result()
    prompt = types.ModelInput.from_ints(list(range(100, 116)))
    datum = types.Datum(
        model_input=prompt,
        loss_fn_inputs={"target_tokens": list(range(101, 117)), "weights": [1.0] * 16},
    )
    one = types.SamplingParams(max_tokens=1, temperature=0.0)
    seconds: dict[str, list[float]] = defaultdict(list)
    differences: list[float] = []
    for version in range(versions + 1):
        training.forward_backward([datum], "cross_entropy").result()
        training.optim_step(types.AdamParams(learning_rate=1e-3)).result()
        known = adapters(sglang)
        times = [time.perf_counter()]
        path = training.save_weights_for_sampler(f"v{version}").result().path
        times.append(time.perf_counter())
        while adapters(sglang) <= known:
            time.sleep(0.005)
        times.append(time.perf_counter())
        sampler = service.create_sampling_client(model_path=path).result()
        begin = time.perf_counter()
        sampler.sample(prompt, num_samples=1, sampling_params=one).result()
        seconds["save"].append(times[1] - times[0])
        seconds["load"].append(times[2] - times[1])
        seconds["usable"].append(times[2] - times[0])
        seconds["first token"].append(time.perf_counter() - begin)
        differences.append(difference(training, sampler, prompt.to_ints()))
    return dict(seconds), differences


def difference(training: tinker.TrainingClient, sampler: tinker.SamplingClient, prompt: list[int]) -> float:
    """Return the mean absolute difference between SGLang's and the trainer's log-probs of drawn tokens."""
    drawn = types.SamplingParams(max_tokens=32, temperature=1.0, stop=[])
    asked = sampler.sample(types.ModelInput.from_ints(prompt), num_samples=1, sampling_params=drawn)
    (sequence,) = asked.result().sequences
    tokens = prompt + list(sequence.tokens)
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
    )
    scored = training.forward([datum], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].data
    return float(np.mean(np.abs(np.asarray(scored[len(prompt) - 1 :]) - sequence.logprobs)))


def adapters(sglang: str) -> set[str]:
    listed = httpx.get(f"{sglang}/v1/models", timeout=60).json()["data"]
    return {each["id"] for each in listed if each.get("parent")}


if __name__ == "__main__":
    main()
