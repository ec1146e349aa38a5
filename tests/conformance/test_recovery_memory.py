"""The memory of a server while it restores models."""

from __future__ import annotations

import signal
import time

import psutil
import pytest
from conformance.server_process import ServerProcess, Wire, datum, tensor

MIB = 1 << 20
MODELS, TOTAL = 8, 300 * MIB
GROWTH = 64 * MIB


def peak(server: ServerProcess, until) -> int:
    """The most memory of the server's process until then, in bytes."""
    assert server.process is not None
    process, most = psutil.Process(server.process.pid), 0
    deadline = time.monotonic() + 300
    while not until() and time.monotonic() < deadline:
        most = max(most, process.memory_info().rss)
        time.sleep(0.05)
    return most


@pytest.mark.slow
def test_a_recovery_streams_what_it_sends(make_server) -> None:
    """After a kill with 300 MiB of payloads over 8 models the server's memory grows by no more than 64 MiB,
    from its start until each model has done some of its operations again."""
    server = make_server(TINSMITH_LONG_POLL_SECONDS="0").start()
    a_while = time.monotonic() + 3
    idle = peak(server, lambda: time.monotonic() > a_while)
    wire = Wire(server.url, "tml-local")
    models = [wire.model() for _ in range(MODELS)]
    server.engine.send_signal(signal.SIGSTOP)  # everything waits
    tokens = list(range(5, 29))
    data = [datum(tokens, tokens, weights=tensor([1.0] * len(tokens)))] * 1200
    submitted = []
    stored = 0
    while stored < TOTAL:
        for model in models:
            answer = wire.forward_backward(model, len(submitted) // MODELS + 1, data)
            answer.raise_for_status()
            submitted.append(answer.json()["request_id"])
        stored = sum(path.stat().st_size for path in server.data_dir.rglob("*.payloads"))
    server.kill()
    server.start(wait_for_engine=False)
    left = set(submitted[:MODELS])

    def all_began() -> bool:
        left.difference_update([each for each in left if wire_again.poll(each).status_code == 200])
        return not left

    wire_again = Wire(server.url, "tml-local")
    most = peak(server, all_began)
    assert not left, "each model has begun"
    assert most - idle <= GROWTH, f"{(most - idle) / MIB:.0f} MiB more than {idle / MIB:.0f}"
