"""Measures the server's overhead per operation: submit to result, less the engine's time on the device.

    python bench/latency.py                              # a tiny random model
    python bench/latency.py --model smollm2-135m --steps 50 --json latency.json

Starts a server, then drives one model as the SDK does: POST forward_backward and optim_step, then long-poll
both. The time on the device is read from the ledger. `health` is the same client's round trip for a request
that does nothing, which is the lower bound on this machine at this load. Then the same client trains and
samples as the SDK does, with answers in protobuf, and the server's own processor time is measured: from the
submit to the answered poll, without the engine and the client. `--python` starts the server of another
environment, such as one with an older version, to be compared in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

ROOT = Path(__file__).parents[1]


_COMMAND = ("-m", "tinsmith.server.cli", "serve")
SERVE = (sys.executable, *_COMMAND)


def start(
    model: str, data_dir: Path, *options: str, serve: tuple[str, ...] = SERVE
) -> tuple[subprocess.Popen, str]:
    """Start a server whose model is called `base`. Returns its process and URL once the engine is ready."""
    command = [*serve, "--model", f"base={model}"]
    log = data_dir.with_suffix(".log")
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, "--port", "0", "--data-dir", str(data_dir), *options],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    while server.poll() is None:
        found = re.search(r"TINKER_BASE_URL=(\S+)", log.read_text())
        if found:
            try:
                if httpx.get(f"{found[1]}/health").json()["engine"]["ready"]:
                    return server, found[1]
            except httpx.TransportError:
                pass
        time.sleep(0.2)
    raise RuntimeError(f"the server ended:\n{log.read_text()}")


def forward_backward_body(model_id: str, seq_id: int) -> bytes:
    from tinsmith.server.wire import tinsmith_wire_pb2 as pb

    request = pb.ForwardBackwardRequest(model_id=model_id, seq_id=seq_id, loss_fn="cross_entropy")
    datum = request.data.add()
    datum.model_input.add().encoded_text.tokens = np.arange(5, 37, dtype="<i4").tobytes()
    for name, dtype, code in (
        ("target_tokens", "<i8", pb.DTYPE_INT64),
        ("weights", "<f4", pb.DTYPE_FLOAT32),
    ):
        tensor = datum.loss_fn_inputs[name]
        tensor.dense, tensor.dtype = np.ones(32, dtype).tobytes(), code
    return request.SerializeToString()


def server_cpu(url: str, server: psutil.Process, count: int) -> dict[str, float]:
    """Return the server's milliseconds of processor time per operation, from submit to answer, by kind."""
    accepted = {"Accept": "application/x-protobuf, application/json"}
    client = httpx.Client(base_url=url, headers={"X-API-Key": "tml-bench"} | accepted, timeout=120)

    def post(path: str, **request: Any) -> httpx.Response:
        return client.post(f"/api/v1/{path}", **request).raise_for_status()

    def wait(submitted: httpx.Response) -> httpx.Response:
        body = {"request_id": submitted.json()["request_id"], "allow_metadata_only": True}
        while (answer := client.post("/api/v1/retrieve_future", json=body)).status_code == 408:
            pass
        return answer.raise_for_status()

    session = post("create_session", json={}).json()["session_id"]
    model = {"session_id": session, "model_seq_id": 0, "base_model": "base", "lora_config": {"rank": 8}}
    model_id = wait(post("create_model", json=model)).json()["model_id"]
    opened = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "base"}
    sampler = post("create_sampling_session", json=opened).json()["sampling_session_id"]

    def train(number: int) -> None:
        body = forward_backward_body(model_id, number)
        wait(post("forward_backward", content=body, headers={"Content-Type": "application/x-protobuf"}))

    def sample(number: int) -> None:
        prompt = {"chunks": [{"type": "encoded_text", "tokens": list(range(5, 13))}]}
        body = {"sampling_session_id": sampler, "seq_id": number, "prompt": prompt, "num_samples": 1}
        wait(post("asample", json=body | {"sampling_params": {"max_tokens": 1, "seed": 1}}))

    used = {}
    for kind, call in (("forward_backward", train), ("sample", sample)):
        for number in range(1, 11):  # the first ones compile
            call(number)
        began = sum(server.cpu_times()[:2])
        for number in range(11, 11 + count):
            call(number)
        used[kind] = 1000 * (sum(server.cpu_times()[:2]) - began) / count
    return used


def measure(url: str, steps: int) -> dict[str, list[tuple[str, float]]]:
    """Return, for each kind of request, the ids and the seconds from submit to result."""
    client = httpx.Client(base_url=url, headers={"X-API-Key": "tml-bench"}, timeout=120)

    def post(path: str, **body) -> dict:
        return client.post(f"/api/v1/{path}", json=body).raise_for_status().json()

    def wait(request_id: str) -> dict:
        while (
            answer := client.post("/api/v1/retrieve_future", json={"request_id": request_id})
        ).status_code == 408:
            pass
        body = answer.raise_for_status().json()
        if "error" in body:
            raise RuntimeError(body["error"])
        return body

    session = post("create_session")["session_id"]
    created = post(
        "create_model", session_id=session, model_seq_id=0, base_model="base", lora_config={"rank": 8}
    )
    model_id = wait(created["request_id"])["model_id"]
    took: dict[str, list[tuple[str, float]]] = {"health": [], "forward_backward": [], "optim_step": []}
    for step in range(steps + 3):
        began = time.perf_counter()
        client.get("/api/v1/healthz")
        took["health"].append(("", time.perf_counter() - began))
        began = time.perf_counter()
        body = forward_backward_body(model_id, 2 * step + 1)
        submitted = client.post(
            "/api/v1/forward_backward", content=body, headers={"Content-Type": "application/x-protobuf"}
        ).json()
        wait(submitted["request_id"])
        took["forward_backward"].append((submitted["request_id"], time.perf_counter() - began))
        began = time.perf_counter()
        submitted = post("optim_step", model_id=model_id, seq_id=2 * step + 2, adam_params={})
        wait(submitted["request_id"])
        took["optim_step"].append((submitted["request_id"], time.perf_counter() - began))
    return {kind: times[3:] for kind, times in took.items()}  # the first ones compile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="a folder, a hub id or smollm2-135m (default: a tiny random model)")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--python", default=sys.executable, help="the interpreter that runs the server")
    parser.add_argument("--json", type=Path, help="also write the numbers to this JSON file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = arguments.model
        if model is None:
            sys.path.insert(0, str(ROOT / "tests"))
            from tiny_models import write_model

            model = str(Path(directory) / "tiny")
            write_model(Path(model), "llama")
        data_dir = Path(directory) / "data"
        server, url = start(model, data_dir, serve=(arguments.python, *_COMMAND))
        try:
            took = measure(url, arguments.steps)
            used = server_cpu(url, psutil.Process(server.pid), 2 * arguments.steps)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(120)
        ledger = sqlite3.connect(data_dir / "ledger.db")
        device = dict(ledger.execute("SELECT id, device_seconds FROM operations").fetchall())
        ledger.close()
    report = {"load": os.getloadavg()[0], "cpus": os.cpu_count(), "steps": arguments.steps}
    print(f"{'ms':18} {'p50':>8} {'p90':>8} {'p99':>8}   device p50")
    for kind, times in took.items():
        overhead = sorted(1000 * (seconds - device.get(name, 0.0)) for name, seconds in times)
        on_device = statistics.median(1000 * device.get(name, 0.0) for name, _seconds in times)
        p50, p90, p99 = (overhead[int(len(overhead) * part)] for part in (0.5, 0.9, 0.99))
        report[kind] = {"p50_ms": p50, "p90_ms": p90, "p99_ms": p99, "device_p50_ms": on_device}
        print(f"{kind:18} {p50:8.2f} {p90:8.2f} {p99:8.2f}   {on_device:8.2f}")
    report["server_cpu_ms"] = used
    for kind, milliseconds in used.items():
        print(f"server's CPU per {kind}, submit and poll: {milliseconds:.2f} ms")
    print(f"load average {report['load']:.1f} on {report['cpus']} processors")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
