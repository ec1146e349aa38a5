"""Measures how late `/healthz` is answered while one client sends expensive requests.

    python bench/hostile.py                                # a minute of each attack together
    python bench/hostile.py --seconds 10 --each            # and each attack alone
    python bench/hostile.py --json hostile.json

Starts a server with a tiny random model. One client, in a separate process, sends the requests in `ATTACKS`
over four connections. Another process requests `/healthz` every 20 ms. Exits with 1 if the 99th percentile of
the answers' latency is over 100 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import httpx
import zstandard
from latency import ROOT, start

CONNECTIONS = 4
HEALTH_EVERY_SECONDS = 0.02
LIMIT_MS = 100
MIB = 1 << 20
JSON = {"Content-Type": "application/json"}
Request = tuple[str, bytes, dict[str, str]]


def _json(path: str, **body: object) -> Request:
    return path, json.dumps(body).encode(), JSON


def _text(mib: int) -> str:
    return "ab " * (mib * MIB // 3)


def _numbers(mib: int) -> str:
    return "[" + ",".join(["12345"] * (mib * MIB // 6)) + "]"


def _written(path: str, body: str) -> Request:
    return path, body.encode(), JSON


def _protobuf(model_id: str, body: bytes) -> Request:
    from tinsmith.server.wire import tinsmith_wire_pb2 as pb

    head = pb.ForwardBackwardRequest(model_id=model_id, seq_id=1, loss_fn="cross_entropy").SerializeToString()
    return "/api/v1/forward_backward", head + body, {"Content-Type": "application/x-protobuf"}


def _zeros(mib: int) -> Request:
    compressed = zstandard.ZstdCompressor().compress(bytes(mib * MIB))
    headers = {"Content-Type": "application/x-protobuf", "Content-Encoding": "zstd"}
    return "/api/v1/forward_backward", compressed, headers


def _datums(count: int, tokens: int) -> str:
    datum = {
        "model_input": {"tokens": [5] * tokens},
        "loss_fn_inputs": {"target_tokens": [6] * tokens, "weights": [0.25] * tokens},
    }
    return json.dumps([datum] * count)


# Bodies are made in the client's process. Each has a few MiB to 256 MiB.
ATTACKS: dict[str, Callable[[], Request]] = {
    "6 MiB text to generate": lambda: _json("/generate", text=_text(6)),
    "6 MiB text to completions": lambda: _json("/v1/completions", model="base", prompt=_text(6)),
    "6 MiB text to chat": lambda: _json(
        "/v1/chat/completions", model="base", messages=[{"role": "user", "content": _text(6)}]
    ),
    "64 texts of 200 KiB": lambda: _json("/v1/completions", model="base", prompt=[_text(1)[:200_000]] * 64),
    "50 MiB of tokens to asample": lambda: _written(
        "/api/v1/asample", f'{{"base_model":"base","prompt":{{"tokens":{_numbers(50)}}}}}'
    ),
    "12 MiB of tokens to asample": lambda: _written(
        "/api/v1/asample", f'{{"base_model":"base","prompt":{{"tokens":{_numbers(12)}}}}}'
    ),
    "12 MiB of tokens to generate": lambda: _written("/generate", f'{{"input_ids":{_numbers(12)}}}'),
    "12 MiB of targets to asample": lambda: _written(
        "/api/v1/asample",
        f'{{"base_model":"base","prompt":{{"tokens":[5]}},"target_prompt_logprobs":{{"data":{_numbers(12)},'
        '"shape":[1,1]}}',
    ),
    "50 MiB of JSON datums": lambda: _written(
        "/api/v1/forward_backward", f'{{"model_id":"none","seq_id":1,"data":{_datums(3000, 500)}}}'
    ),
    "50 MiB of metadata": lambda: _json("/api/v1/create_session", user_metadata={"a": _text(50)}),
    "1 MiB of lists as metadata": lambda: _written(
        "/api/v1/create_session", '{"user_metadata":{"a":[' + "[]," * 300_000 + "1]}}"
    ),
    "900 KiB of keys": lambda: _json(
        "/api/v1/create_session", user_metadata={f"key {i}": i for i in range(45_000)}
    ),
    "deep lists": lambda: _written("/api/v1/create_session", '{"user_metadata":{"a":' + "[" * 500_000),
    "12 MiB of unknown fields": lambda: _written(
        "/api/v1/asample", '{"x":[' + '{"a":0},' * (3 * MIB // 2) + "0]}"
    ),
    "50 MiB that are not JSON": lambda: ("/api/v1/forward_backward", b'{"a":' + b"[" * (50 * MIB), JSON),
    "numbers of 4,000 digits": lambda: _written(
        "/api/v1/asample", '{"base_model":"base","prompt":{"tokens":[' + ",".join(["9" * 4000] * 2000) + "]}}"
    ),
    "compressed zeros": lambda: _zeros(256),
    "compressed zeros over the limit": lambda: _zeros(2048),
    "a million protobuf fields": lambda: _protobuf("none", b"\x1a\x00" * 1_000_000),
    "five million protobuf fields": lambda: _protobuf("none", b"\x1a\x00" * 5_000_000),
    "50 MiB of protobuf": lambda: _protobuf(
        "none", b"\x1a" + bytes([0x80, 0x80, 0x80, 0x19]) + bytes(50 * MIB)
    ),
}


def attack(url: str, names: list[str], seconds: float, results: Connection) -> None:
    """Send the named attacks repeatedly, and return the statuses of each."""
    requests = [(name, *ATTACKS[name]()) for name in names]
    statuses: collections.Counter[str] = collections.Counter()
    results.send(sum(len(body) for _name, _path, body, _headers in requests))

    async def send() -> None:
        until = time.monotonic() + seconds
        mine = random.sample(requests, len(requests))
        async with httpx.AsyncClient(base_url=url, headers={"X-API-Key": "tml-bench"}, timeout=300) as client:
            for name, path, body, headers in itertools.cycle(mine):
                if time.monotonic() > until:
                    return
                try:
                    answer = await client.post(path, content=body, headers=headers)
                    statuses[f"{name}: {answer.status_code}"] += 1
                except httpx.TransportError as error:
                    statuses[f"{name}: {type(error).__name__}"] += 1

    async def send_all() -> None:
        await asyncio.gather(*(send() for _ in range(CONNECTIONS)))

    asyncio.run(send_all())
    results.send(dict(sorted(statuses.items())))


def measure(url: str, names: list[str], seconds: float) -> dict:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    attacker = context.Process(target=attack, args=(url, names, seconds, theirs))
    attacker.start()
    size = ours.recv()
    took = []
    with httpx.Client(base_url=url, timeout=300) as client:
        while not ours.poll():
            began = time.perf_counter()
            client.get("/healthz").raise_for_status()
            took.append(1000 * (time.perf_counter() - began))
            time.sleep(HEALTH_EVERY_SECONDS)
    statuses = ours.recv()
    attacker.join()
    took.sort()
    health = {f"p{part}": took[min(len(took) - 1, len(took) * part // 100)] for part in (50, 90, 99, 100)}
    return {"mib": size / MIB, "health_ms": health, "health_requests": len(took), "statuses": statuses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--each", action="store_true", help="also run each attack alone")
    parser.add_argument("--only", help="only attacks whose names contain this")
    parser.add_argument("--json", type=Path, help="also write the numbers to this JSON file")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_models import write_model

    names = [name for name in ATTACKS if arguments.only is None or arguments.only in name]
    rounds = {"all together": names} | ({name: [name] for name in names} if arguments.each else {})
    report: dict = {"seconds": arguments.seconds, "connections": CONNECTIONS, "cpus": os.cpu_count()}
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "tiny"
        write_model(model, "llama")
        server, url = start(str(model), Path(directory) / "data")
        try:
            print(f"{'/healthz, ms':34} {'p50':>7} {'p90':>7} {'p99':>7} {'max':>7}   statuses")
            for name, together in rounds.items():
                found = report[name] = measure(url, together, arguments.seconds)
                numbers = " ".join(f"{value:7.1f}" for value in found["health_ms"].values())
                shown = collections.Counter()
                for what, count in found["statuses"].items():
                    shown[what.rpartition(": ")[2]] += count
                print(f"{name:34} {numbers}   {dict(shown)}", flush=True)
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(120)
            finally:
                server.kill()
    report["load"] = os.getloadavg()[0]
    print(f"load average {report['load']:.1f} on {report['cpus']} processors")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2))
    sys.exit(report["all together"]["health_ms"]["p99"] > LIMIT_MS)


if __name__ == "__main__":
    main()
