"""Measures the path of large training requests: the server's CPU per token, and how long a device would wait.

    python bench/request_path.py                        # 8 clients x 64 datums of 16k tokens; half a minute
    python bench/request_path.py --real-time            # at the device's own speed: ten minutes a round
    python bench/request_path.py --json request_path.json

The server is a real one. Its engine computes nothing: it waits as long as a device of `--rate` tokens per
second would take (`fixed_rate_engine.py`). Every client sends a batch in requests of 5 MB, as the SDK does,
then an optim_step, waits for all answers, and begins again.

Without `--real-time` the engine is `--speed-up` times as fast. The seconds that it waits and works on the
host are then compared with the time that the tokens take a device of the true rate. That overstates the
share: a slower device leaves the server more time to have the next request ready.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import httpx
import numpy as np
import psutil
from latency import ROOT, start

PROTOBUF = "application/x-protobuf"
CHUNK_BYTES = 5_000_000  # of one request of the SDK


def bodies(datums: int, tokens: int) -> list[list[bytes]]:
    """Return the datums of a batch, encoded, by request."""
    from tinsmith.server.wire import tinsmith_wire_pb2 as pb

    random = np.random.default_rng(0)
    chunks: list[list[bytes]] = [[]]
    for _ in range(datums):
        datum = pb.Datum()
        ids = random.integers(5, 300, tokens + 1)
        datum.model_input.add().encoded_text.tokens = ids[:-1].astype("<i4").tobytes()
        for name, values, dtype, code in (
            ("target_tokens", ids[1:], "<i8", pb.DTYPE_INT64),
            ("weights", np.ones(tokens), "<f4", pb.DTYPE_FLOAT32),
        ):
            tensor = datum.loss_fn_inputs[name]
            tensor.dense, tensor.dtype = values.astype(dtype).tobytes(), code
        encoded = datum.SerializeToString()
        if sum(map(len, chunks[-1])) + len(encoded) > CHUNK_BYTES and chunks[-1]:
            chunks.append([])
        chunks[-1].append(encoded)
    return chunks


def request_body(model_id: str, seq_id: int, chunk: list[bytes]) -> bytes:
    """Return a ForwardBackwardRequest without encoding its datums again: fields of one message are joined."""
    from tinsmith.server.wire import tinsmith_wire_pb2 as pb

    head = pb.ForwardBackwardRequest(model_id=model_id, seq_id=seq_id, loss_fn="cross_entropy")
    number = pb.ForwardBackwardRequest.DESCRIPTOR.fields_by_name["data"].number
    parts = [head.SerializeToString()]
    for encoded in chunk:
        parts += [_varint(number << 3 | 2), _varint(len(encoded)), encoded]
    return b"".join(parts)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


async def train(url: str, number: int, chunks: list[list[bytes]], rounds: int) -> None:
    """Train one model for so many batches."""
    async with httpx.AsyncClient(base_url=url, headers={"X-API-Key": "tml-bench"}, timeout=None) as http:

        async def post(path: str, **request) -> dict:
            return (await http.post(f"/api/v1/{path}", **request)).raise_for_status().json()

        async def wait(submitted: dict) -> None:
            while True:
                answer = await http.post(
                    "/api/v1/retrieve_future", json=submitted, headers={"Accept": f"{PROTOBUF}, */*"}
                )
                if answer.status_code != 408:
                    answer.raise_for_status()
                    return

        session = (await post("create_session", json={}))["session_id"]
        created = await post(
            "create_model",
            json={
                "session_id": session,
                "model_seq_id": number,
                "base_model": "base",
                "lora_config": {"rank": 8},
            },
        )
        while (answer := await http.post("/api/v1/retrieve_future", json=created)).status_code == 408:
            pass
        model_id, seq_id = answer.json()["model_id"], 0
        for _ in range(rounds):
            submitted = []
            for chunk in chunks:
                seq_id += 1
                body = request_body(model_id, seq_id, chunk)
                headers = {"Content-Type": PROTOBUF}
                submitted.append(await post("forward_backward", content=body, headers=headers))
            seq_id += 1
            submitted.append(
                await post("optim_step", json={"model_id": model_id, "seq_id": seq_id, "adam_params": {}})
            )
            await asyncio.gather(*map(wait, submitted))


def drive(url: str, clients: int, datums: int, tokens: int, rounds: int) -> None:
    """Run all clients, in a process of their own."""

    async def run() -> None:
        chunks = bodies(datums, tokens)
        await asyncio.gather(*(train(url, number, chunks, rounds) for number in range(clients)))

    asyncio.run(run())


def cpu_seconds(server: psutil.Process) -> float:
    """Return what the server and its workers have used, without the engine."""
    total = 0.0
    for process in [server, *server.children(recursive=True)]:
        if "fixed_rate_engine" not in process.cmdline():
            times = process.cpu_times()
            total += times.user + times.system
    return total


def serve() -> None:
    """Be `tinsmith serve`, with the engine of this benchmark."""
    from functools import partial

    from tinsmith.server import app as application
    from tinsmith.server.cli import app

    application.Supervisor = partial(application.Supervisor, module="fixed_rate_engine")  # type: ignore
    app(["serve", *sys.argv[2:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--datums", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16384, help="of each datum")
    parser.add_argument("--rounds", type=int, default=1, help="batches of each client")
    parser.add_argument("--rate", type=float, default=15_000, help="tokens per second of the device")
    parser.add_argument("--speed-up", type=float, default=20, help="of the simulated device")
    parser.add_argument("--real-time", action="store_true", help="the same as --speed-up 1")
    parser.add_argument("--json", type=Path, help="also write the numbers to this JSON file")
    arguments = parser.parse_args()
    speed_up = 1.0 if arguments.real_time else arguments.speed_up
    with tempfile.TemporaryDirectory() as directory:
        sys.path.insert(0, str(ROOT / "tests"))
        from tiny_models import write_model

        folder = Path(directory)
        model = write_model(folder / "tiny", "llama", max_position_embeddings=32768)
        os.environ |= {
            "PYTHONPATH": str(ROOT / "bench"),
            "TINSMITH_TEST_RATE": str(arguments.rate * speed_up),
            "TINSMITH_TEST_REPORT": str(folder / "report.json"),
            "TINSMITH_SNAPSHOT_BYTES": str(1 << 50),  # this engine saves nothing
        }
        server, url = start(str(model), folder / "data", serve=(sys.executable, __file__, "--serve"))
        process = psutil.Process(server.pid)
        load, used, began = os.getloadavg()[0], cpu_seconds(process), time.perf_counter()
        sizes = (arguments.clients, arguments.datums, arguments.tokens, arguments.rounds)
        crowd = multiprocessing.get_context("spawn").Process(target=drive, args=(url, *sizes))
        crowd.start()
        crowd.join()
        took = time.perf_counter() - began
        used = cpu_seconds(process) - used
        server.send_signal(signal.SIGTERM)
        server.wait(120)
        if crowd.exitcode:
            raise SystemExit("a client failed:\n" + (folder / "data.log").read_text()[-2000:])
        engine = json.loads((folder / "report.json").read_text())
    device = engine["tokens"] / arguments.rate
    beside = engine["waited_seconds"] + engine["host_seconds"]
    report = {
        "clients": arguments.clients,
        "datums": arguments.datums,
        "tokens_per_datum": arguments.tokens,
        "rounds": arguments.rounds,
        "rate": arguments.rate,
        "speed_up": speed_up,
        "load": load,
        "cpus": os.cpu_count(),
        "seconds": took,
        "server_cpu_seconds": used,
        "server_cpu_microseconds_per_token": 1e6 * used / engine["tokens"],
        "device_seconds": device,
        **{name: value for name, value in engine.items() if name != "seconds"},
        "waiting_share": engine["waited_seconds"] / (device + beside),
        "waiting_and_host_share": beside / (device + beside),
    }
    print(f"{engine['tokens']:,} tokens: {device:.0f} s on a device of {arguments.rate:,.0f} tokens/s")
    print(
        f"server's CPU          {used:8.2f} s  {report['server_cpu_microseconds_per_token']:.3f} µs per token"
    )
    print(
        f"device without work   {engine['waited_seconds']:8.2f} s  {report['waiting_share']:.2%} of its time"
    )
    print(f"engine's host work    {engine['host_seconds']:8.2f} s")
    print(f"both together                     {report['waiting_and_host_share']:.2%}")
    print(f"load average {load:.1f} on {report['cpus']} processors, {took:.0f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve()
    else:
        main()
