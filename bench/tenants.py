"""Measures what several tenants get of one device: `python bench/tenants.py --model smollm2-135m`.

Each tenant has a key and an adapter, and trains small batches in a closed loop with the official SDK. Prints,
for each number of tenants, the tokens per second of all together, the median time of a step, and the smallest
tenant's share of an equal part.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import tinker
from latency import ROOT, start
from tinker import types


class Tenant:
    """A client with a key of its own, which trains batches of `datums` datums of `length` tokens."""

    def __init__(self, url: str, key: str, datums: int, length: int):
        service = tinker.ServiceClient(base_url=url, api_key=key)
        self._client = service.create_lora_training_client(base_model="base", rank=8).result()
        tokens = [5 + 7 * i % 300 for i in range(length + 1)]
        fields = {"target_tokens": tokens[1:], "weights": [1.0] * length}
        model_input = types.ModelInput.from_ints(tokens[:-1])
        self._batch = [types.Datum(model_input=model_input, loss_fn_inputs=fields)] * datums
        self.seconds: list[float] = []

    def step(self) -> None:
        passed = self._client.forward_backward(self._batch, "cross_entropy")
        self._client.optim_step(types.AdamParams(learning_rate=1e-4)).result()
        passed.result()

    def train(self, until: float) -> None:
        self.seconds.clear()
        while time.monotonic() < until:
            began = time.monotonic()
            self.step()
            self.seconds.append(time.monotonic() - began)


def together(tenants: list[Tenant], seconds: float, tokens: int) -> dict[str, float]:
    """Let these tenants train at the same time. `tokens`: of one batch."""
    for tenant in tenants:
        tenant.step()  # what is compiled for so many
    began = time.monotonic()
    threads = [threading.Thread(target=each.train, args=(began + seconds,)) for each in tenants]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.monotonic() - began
    steps = [len(tenant.seconds) for tenant in tenants]
    return {
        "tenants": len(tenants),
        "tokens_per_second": round(sum(steps) * tokens / took, 1),
        "step_seconds": round(statistics.median(s for each in tenants for s in each.seconds), 3),
        "smallest_share": round(min(steps) * len(steps) / sum(steps), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="a folder, a hub id or smollm2-135m (default: a tiny random model)")
    parser.add_argument("--tenants", default="1,2,4,8", help="how many at a time")
    parser.add_argument("--datums", type=int, default=2)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each number of tenants")
    parser.add_argument("--json", type=Path, help="also write the numbers to this JSON file")
    asked = parser.parse_args()
    counts = [int(each) for each in asked.tenants.split(",")]
    keys = [f"tml-bench-{number:04}" for number in range(max(counts))]
    with tempfile.TemporaryDirectory() as directory:
        folder, model = Path(directory), asked.model
        if model is None:
            sys.path.insert(0, str(ROOT / "tests"))
            from tiny_models import write_model

            model = str(write_model(folder / "tiny", "llama"))
        given = [option for key in keys for option in ("--api-key", f"{key.replace('tml-', '')}={key}")]
        server, url = start(model, folder / "data", *given)
        try:
            tenants = [Tenant(url, key, asked.datums, asked.length) for key in keys]
            tokens = asked.datums * asked.length
            together(tenants, 1.0, tokens)  # compiles
            rows = [together(tenants[:count], asked.seconds, tokens) for count in counts]
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(300)
    print(f"{'tenants':>8}{'tokens/s':>12}{'step, s':>10}{'smallest share':>16}")
    for row in rows:
        cells = (row["tenants"], row["tokens_per_second"], row["step_seconds"], row["smallest_share"])
        print("{:>8}{:>12}{:>10}{:>16}".format(*cells))
    report = {"model": asked.model or "tiny", "datums": asked.datums, "length": asked.length, "rows": rows}
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
    if asked.json:
        asked.json.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
