"""Two servers on one data directory: one serves, the other says why it does not.

`TINSMITH_TEST_STARTS=50 pytest tests/conformance/test_two_servers.py -s` starts two at once that often.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import subprocess
import time
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from conformance.server_process import ServerProcess, Wire

STARTS = int(os.environ.get("TINSMITH_TEST_STARTS", "5"))


def refusal(server: ServerProcess) -> str | None:
    """Why a server ended at its start; None for one that answers."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert server.process is not None
        code = server.process.poll()
        if code is not None:
            assert code == 2, server.log
            return server.log.splitlines()[-1]
        if found := re.findall(r"on http://127.0.0.1:(\d+)", server.log):
            server.port = int(found[-1])
            if server.health() is not None:
                return None
        time.sleep(0.05)
    raise TimeoutError(server.log)


def begin_two(servers: list[ServerProcess]) -> ServerProcess:
    """Starts both at once; the one that serves, when the other has said why it does not."""
    for server in servers:
        server._log.write_text("")
        with server._log.open("a") as log:
            server.process = subprocess.Popen(
                [*server._command, "--port", "0"], stdout=log, stderr=log, env=server._environment
            )
    reasons = [refusal(server) for server in servers]
    assert reasons.count(None) == 1, reasons
    serving, other = servers if reasons[0] is None else reversed(servers)
    assert serving.process is not None
    reason = next(filter(None, reasons))
    assert f"is in use by another server: process {serving.process.pid} on " in reason
    assert reason.startswith("tinsmith: the data directory ")
    assert "Traceback" not in other.log
    return serving


@pytest.fixture
def servers(tiny_model: Path, cache_dir: Path, tmp_path: Path):
    both = [ServerProcess(tiny_model, tmp_path / "data", cache_dir) for _ in range(2)]
    for number, server in enumerate(both):
        server._log = tmp_path / f"{number}.log"
    yield both
    for server in both:
        server.kill()


def steps(data_dir: Path) -> list[tuple[str, int]]:
    with sqlite3.connect(data_dir / "ledger.db") as ledger:
        return ledger.execute("SELECT kind, count(*) FROM operations GROUP BY 1 ORDER BY 1").fetchall()


@pytest.mark.slow
def test_one_of_two_servers_that_start_at_once_serves_and_operations_run_once(servers, make_server) -> None:
    """After each start a step is submitted and the server killed, often before the step has run. The weights
    are in the end those of a server that was alone and was never killed."""
    alone = Wire(make_server().start().url, "tml-local")
    expected_model = alone.model()
    model = None
    for number in range(STARTS):
        serving = begin_two(servers)
        wire = Wire(serving.url, "tml-local")
        if model is None:
            model = wire.model()
        wire.forward_backward(model, 2 * number + 1)
        last = wire.optim_step(model, 2 * number + 2, learning_rate=1e-2)
        alone.forward_backward(expected_model, 2 * number + 1)
        expected = alone.optim_step(expected_model, 2 * number + 2, learning_rate=1e-2)
        if number < STARTS - 1:
            serving.kill()
        print(f"start {number + 1}: process {serving.process.pid} served")
    wire.result(last)
    alone.result(expected)

    def logprobs(client: Wire, name: str) -> np.ndarray:
        answer = client.result(client.forward_backward(name, 2 * STARTS + 1))
        return np.array(answer["loss_fn_outputs"][0]["logprobs"]["data"])

    np.testing.assert_array_equal(logprobs(wire, model), logprobs(alone, expected_model))
    assert steps(serving.data_dir) == [
        ("create_model", 1),
        ("forward_backward", STARTS + 1),
        ("optim_step", STARTS),
    ]


def test_a_server_that_has_lost_its_lease_stops_with_its_engine(make_server) -> None:
    """The second server is named while the first one serves; a first one that was replaced ends."""
    first = make_server().start()
    second = ServerProcess(
        Path(first._command[first._command.index("--model") + 1].removeprefix("tiny=")),
        first.data_dir,
        first.data_dir.parent / "cache",
    )
    assert first.process is not None
    refused = subprocess.run(
        [*second._command, "--port", "0"], env=second._environment, capture_output=True, text=True, timeout=60
    )
    assert refused.returncode == 2
    assert f"in use by another server: process {first.process.pid} on " in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    wire, engine = Wire(first.url, "tml-local"), first.engine
    model = wire.model()
    descriptors = Path(f"/proc/{engine.pid}/fd")
    if descriptors.is_dir():
        opened = [os.readlink(each) for each in descriptors.iterdir() if each.is_symlink()]
        assert str(first.data_dir / "owner.lock") in opened, "the engine keeps the directory while it lives"

    with sqlite3.connect(first.data_dir / "ledger.db") as thief:
        thief.execute("UPDATE lease SET generation = generation + 1")
    thief.close()
    before = steps(first.data_dir)
    with contextlib.suppress(httpx.TransportError):  # it ends, perhaps while it answers
        assert wire.forward_backward(model, 1).status_code == 503
    assert first.process.wait(20) == 1
    psutil.wait_procs([engine], timeout=20)
    assert not engine.is_running()
    assert "does not own its ledger any more" in first.log
    assert steps(first.data_dir) == before
    first.start()
    assert "metrics" in wire.result(wire.forward_backward(model, 1)), "the next one goes on"
