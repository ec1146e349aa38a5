"""Measures the ledger under large payloads: others' waiting time, bytes written, memory during a recovery.

    python bench/ledger.py                       # 1,000 payloads of 500 kB; 300 MiB over 8 models
    python bench/ledger.py --json ledger.json
    python bench/ledger.py --no-recovery         # only the first part, which needs no engine

First part, without an engine: one tenant's operations are accepted, answered and then forgotten as after a
snapshot, while another tenant submits a small operation every few milliseconds. `written` counts the bytes
that the process passes to the system, and those that reach the disk, per byte of payload.

Second part: a server with a tiny model accepts large operations of several models while its engine is
stopped. Both processes are killed, and the memory of the next server is measured while it recovers the
models. It is compared with a server that has nothing to recover.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
MIB = 1 << 20
EVERY_SECONDS = 0.005  # between two submits of the other tenant


def written() -> dict[str, int]:
    """Return the bytes that this process has written so far."""
    with Path("/proc/self/io").open() as file:
        counts = dict(line.strip().split(": ") for line in file)
    return {"to the system": int(counts["wchar"]), "to the disk": int(counts["write_bytes"])}


async def forget(folder: Path, count: int, size: int) -> dict:
    from engineless import MODEL, Server, model, sample
    from tinsmith.engine import messages
    from tinsmith.server.ledger import tenancy
    from tinsmith.server.operations.operation import Submission, natural_key

    server = Server(folder)
    await server.ledger.write(model)
    await server.ledger.write(lambda connection: tenancy.ensure_tenant(connection, "other"))
    await server.runs.find("me", MODEL)
    phases: dict[str, list[float]] = {"accepting": [], "forgetting": []}
    phase = "accepting"
    number = 0

    async def submit_small_ones() -> None:
        nonlocal number
        while True:
            number += 1
            began = time.perf_counter()
            await server.operations.accept(sample(number))
            phases[phase].append(time.perf_counter() - began)
            await asyncio.sleep(EVERY_SECONDS)

    def step(seq_id: int) -> Submission:
        data = [messages.Datum(os.urandom(size), {})]
        return Submission(
            "me",
            "forward_backward",
            natural_key(MODEL, seq_id),
            lambda request_id: messages.ForwardBackward(request_id, MODEL, data, "cross_entropy"),
            model_id=MODEL,
            seq_id=seq_id,
        )

    before, began = written(), time.perf_counter()
    other = asyncio.ensure_future(submit_small_ones())
    for seq_id in range(1, count + 1):
        operation = await server.operations.accept(step(seq_id))
        output = messages.ForwardBackwardOutput([], {})
        server.operations.on_answer(messages.Done(operation.request_id, output))
        await operation.finished.wait()
    accepting = time.perf_counter() - began
    server.payloads.seal(MODEL)  # a snapshot begins
    phase, began = "forgetting", time.perf_counter()
    await server.payloads.forget_through(MODEL, count)
    forgetting = time.perf_counter() - began
    await asyncio.sleep(0.5)  # work that follows the snapshot counts as well
    other.cancel()
    await asyncio.gather(other, return_exceptions=True)
    server.payloads.close()
    server.ledger.close()
    after = written()
    return {
        "payloads": count,
        "payload_bytes": size,
        "accepting_seconds": accepting,
        "forgetting_seconds": forgetting,
        "waits_ms": {
            name: {
                "median": 1000 * statistics.median(took),
                "p99": 1000 * sorted(took)[len(took) * 99 // 100],
                "worst": 1000 * max(took),
                "writes": len(took),
            }
            for name, took in phases.items()
        },
        "written_per_payload_byte": {name: (after[name] - before[name]) / (count * size) for name in after},
    }


def recover(folder: Path, models: int, total: int, seconds: float) -> dict:
    from conformance.server_process import ServerProcess, Wire, datum, tensor
    from tiny_models import write_model

    write_model(folder / "tiny", "llama")
    server = ServerProcess(
        folder / "tiny", folder / "data", folder / "cache", TINSMITH_SNAPSHOT_BYTES=str(1 << 40)
    )
    idle = peak(server.start(), 5.0)
    wire = Wire(server.url, "tml-local")
    ids = [wire.model() for _ in range(models)]
    server.engine.send_signal(signal.SIGSTOP)
    tokens = list(range(5, 29))
    one = datum(tokens, tokens, weights=tensor([1.0] * len(tokens)))
    per_operation = 1200  # datums: about half a megabyte
    seq_id = accepted = 0
    while accepted < total:
        seq_id += 1
        for model in ids:
            wire.forward_backward(model, seq_id, [one] * per_operation).raise_for_status()
        accepted = sum(path.stat().st_size for path in folder.rglob("*.payloads"))
    server.kill()
    recovering = peak(server.start(wait_for_engine=False), seconds)
    server.kill()
    return {
        "models": models,
        "operations": models * seq_id,
        "payload_mib": accepted / MIB,
        "idle_mib": idle,
        "recovering_mib": recovering,
        "growth_mib": recovering - idle,
    }


def peak(server, seconds: float) -> float:
    """Return the peak memory of the server's process, in MiB."""
    process, most = psutil.Process(server.process.pid), 0
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        most = max(most, process.memory_info().rss)
        time.sleep(0.05)
    return most / MIB


def show(report: dict) -> None:
    if "forgetting" in report:
        part = report["forgetting"]
        print(f"{part['payloads']} payloads of {part['payload_bytes'] // 1000} kB")
        print(f"  accepted and answered in {part['accepting_seconds']:.1f} s")
        print(f"  forgotten in             {part['forgetting_seconds']:.2f} s")
        for name, waits in part["waits_ms"].items():
            print(
                f"  another tenant's writes while {name}: median {waits['median']:.1f} ms, "
                f"p99 {waits['p99']:.1f} ms, worst {waits['worst']:.1f} ms ({waits['writes']} writes)"
            )
        for name, ratio in part["written_per_payload_byte"].items():
            print(f"  written {name} per payload byte: {ratio:.2f}")
    if "recovery" in report:
        part = report["recovery"]
        print(f"recovery of {part['payload_mib']:.0f} MiB of payloads over {part['models']} models")
        print(
            f"  the server's memory: {part['idle_mib']:.0f} MiB idle, {part['recovering_mib']:.0f} MiB at "
            f"most, {part['growth_mib']:.0f} MiB more"
        )
    print(f"load average {report['load']:.1f} on {report['cpus']} processors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--payloads", type=int, default=1000)
    parser.add_argument("--bytes", type=int, default=500_000)
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--recovery-mib", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=60, help="how long to measure a recovery")
    parser.add_argument("--no-recovery", action="store_true")
    parser.add_argument("--no-forgetting", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the numbers to this JSON file")
    arguments = parser.parse_args()
    report: dict = {"load": os.getloadavg()[0], "cpus": os.cpu_count()}
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        if not arguments.no_forgetting:
            (folder / "forget").mkdir()
            report["forgetting"] = asyncio.run(forget(folder / "forget", arguments.payloads, arguments.bytes))
        if not arguments.no_recovery:
            (folder / "recover").mkdir()
            report["recovery"] = recover(
                folder / "recover", arguments.models, arguments.recovery_mib * MIB, arguments.seconds
            )
    show(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
