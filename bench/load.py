"""Runs many clients at once, and measures errors, the server's memory and the latency of `/healthz`.

    python bench/load.py                                  # 200 clients, 2000 open polls, 10 minutes
    python bench/load.py --seconds 120 --json load.json

Every client trains a tiny model and samples in a closed loop. The open polls are for operations that wait for
earlier ones that never come. A separate process requests `/healthz` every 50 ms. Memory is compared after the
first tenth of the time, when every program is compiled and every connection is open. Exits with 1 after any
error.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import httpx
import psutil
from latency import ROOT, start
from load_clients import Client, Tally, hold_poll

HEALTH_EVERY_SECONDS = 0.05
MIB = 1 << 20


def measure_health(url: str, seconds: float, results: Connection) -> None:
    """Measure the seconds of each answer, in a process that does nothing else."""
    took = []
    until = time.monotonic() + seconds
    with httpx.Client(base_url=url, timeout=60) as client:
        while time.monotonic() < until:
            began = time.perf_counter()
            client.get("/healthz").raise_for_status()
            took.append(time.perf_counter() - began)
            time.sleep(HEALTH_EVERY_SECONDS)
    results.send(took)


def resident(server: psutil.Process) -> dict[str, float]:
    """Return the resident memory of the server and of its engine, in MiB."""
    (engine,) = (child for child in server.children() if "tinsmith.engine" in child.cmdline())
    return {"server": server.memory_info().rss / MIB, "engine": engine.memory_info().rss / MIB}


async def run(url: str, pid: int, clients: int, polls: int, seconds: float) -> dict:
    tally, held = Tally(), Tally()
    crowd = [Client(url, tally) for _ in range(clients)]
    began = time.monotonic()
    await asyncio.gather(*(client.create() for client in crowd))
    create_seconds = time.monotonic() - began

    began, requests = time.monotonic(), tally.requests
    until = began + seconds
    running = [asyncio.create_task(client.run(until)) for client in crowd]
    for number in range(polls):
        running.append(asyncio.create_task(hold_poll(url, crowd[number % clients].held, held, until)))
        if number % 50 == 0:  # all polls are opened within a tenth of the time
            await asyncio.sleep(5 * seconds / polls)
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    health = multiprocessing.get_context("spawn").Process(
        target=measure_health, args=(url, until - time.monotonic(), theirs)
    )
    health.start()
    server, memory = psutil.Process(pid), []
    for part in (0.1, 0.5, 1.0):
        await asyncio.sleep(max(0.0, began + part * seconds - time.monotonic()))
        memory.append({"seconds": part * seconds} | resident(server))
        print(
            f"{part:4.0%}: {tally.steps} steps, {tally.samples} samples, {sum(tally.errors.values())} errors"
        )
    await asyncio.gather(*running)
    took = sorted(await asyncio.to_thread(ours.recv))
    health.join()
    errors = tally.errors + held.errors
    return {
        "clients": clients,
        "open_polls": polls,
        "seconds": seconds,
        "create_seconds": create_seconds,
        "requests_per_second": (tally.requests - requests + held.requests) / (time.monotonic() - began),
        "steps": tally.steps,
        "samples": tally.samples,
        "statuses": dict(tally.statuses + held.statuses),
        "errors": sum(errors.values()),
        "kinds_of_errors": dict(errors.most_common(10)),
        "memory_mib": memory,
        "health_ms": {
            f"p{part}": 1000 * took[min(len(took) - 1, len(took) * part // 100)] for part in (50, 90, 99, 100)
        },
        "health_requests": len(took),
        "load": os.getloadavg()[0],
        "cpus": os.cpu_count(),
    }


def show(report: dict) -> None:
    rows = {
        "clients": report["clients"],
        "open polls": report["open_polls"],
        "requests/s": f"{report['requests_per_second']:.0f}",
        "training steps": report["steps"],
        "samples": report["samples"],
        "errors": report["errors"],
    }
    rows |= {f"/healthz {name}": f"{value:.1f} ms" for name, value in report["health_ms"].items()}
    for process in ("server", "engine"):
        values = " -> ".join(f"{at[process]:.0f}" for at in report["memory_mib"])
        rows[f"{process} memory"] = f"{values} MiB"
    for name, value in rows.items():
        print(f"{name:18} {value}")
    for error, count in report["kinds_of_errors"].items():
        print(f"{count:6} x {error}")
    print(f"load average {report['load']:.1f} on {report['cpus']} processors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--polls", type=int, default=2000)
    parser.add_argument("--json", type=Path, help="also write the numbers to this JSON file")
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    # The operations that are waited for have to stay pending for the whole run.
    os.environ["TINSMITH_GAP_GRACE_SECONDS"] = str(arguments.seconds + 3600)
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_models import write_model

    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "tiny"
        write_model(model, "llama")
        server, url = start(str(model), Path(directory) / "data")
        try:
            report = asyncio.run(run(url, server.pid, arguments.clients, arguments.polls, arguments.seconds))
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(120)
            finally:
                server.kill()
    show(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2))
    sys.exit(report["errors"] > 0)


if __name__ == "__main__":
    main()
