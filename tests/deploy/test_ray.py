"""A server as a job of a real Ray, as docs/ray.md says (`make ray`)."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

pytest.importorskip("tinker")

import tinker
from docs.pages import ROOT, block, executed
from tinker import types
from tiny_models import write_model

BIN = ROOT / ".cache" / "ray" / "venv" / "bin"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (BIN / "ray").exists(), reason="no Ray: make ray")]
Ray = Callable[..., str]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture
def ray(tmp_path: Path) -> Iterator[Ray]:
    """Commands of a cluster of one node, which pretends to have a GPU."""
    dashboard = _free_port()
    environment = os.environ | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "RAY_JOB_STOP_WAIT_TIME_S": "120",
        "JAX_PLATFORMS": "cpu",
        "TINSMITH_CACHE_DIR": str(tmp_path / "cache"),
    }

    def run(command: str, accepted: int = 0) -> str:
        done = subprocess.run(
            ["bash", "-euc", command], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == accepted, done.stdout + done.stderr
        return done.stdout + done.stderr

    head = f"ray start --head --port {_free_port()} --dashboard-host 127.0.0.1 --dashboard-port {dashboard}"
    folder = tempfile.mkdtemp(prefix="ray")  # the paths of its sockets must be short
    try:
        run(f"env -u RAY_ADDRESS {head} --num-gpus 1 --disable-usage-stats --temp-dir {folder}")
        yield run
    finally:
        run("env -u RAY_ADDRESS ray stop --force")
        shutil.rmtree(folder, ignore_errors=True)


def _step(url: str, path: str | None) -> tuple[float, str]:
    """Train one step, from scratch or from a saved state. Return its loss, and the path of its own save."""
    service = tinker.ServiceClient(base_url=url, api_key="tml-local")
    if path is None:
        client = service.create_lora_training_client(base_model="tiny", rank=4, seed=1).result()
    else:
        client = service.create_training_client_from_state_with_optimizer(path).result()
    datum = types.Datum(
        model_input=types.ModelInput.from_ints([1, 2, 3]),
        loss_fn_inputs={"target_tokens": [2, 3, 4], "weights": [1.0] * 3},
    )
    passed = client.forward_backward([datum], "cross_entropy")
    client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    saved = client.save_state("step").result().path
    return passed.result().metrics["loss:sum"], saved


def test_a_job_serves_stops_with_all_saved_and_the_next_one_goes_on(ray: Ray, tmp_path: Path) -> None:
    shown = block("ray.md", "export RAY_ADDRESS")
    model, port, data_dir = write_model(tmp_path / "tiny", "llama"), _free_port(), tmp_path / "data"
    command = shown.partition("\n")[2].replace(".venv/bin/", f"{ROOT}/.venv/bin/")
    command = command.replace("Qwen/Qwen3-8B --host 0.0.0.0", f"tiny={model}")
    command = command.replace("8000", str(port)).replace("/shared/tinsmith", str(data_dir))
    losses, path = [], None
    for job in ("tinsmith-1", "tinsmith-2"):
        ray(command.replace("tinsmith-1", job))
        executed(command)
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").json()["engine"]["ready"]:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        loss, path = _step(f"http://127.0.0.1:{port}", path)
        losses.append(loss)
        ray(f"ray job stop {job}")
        log = ray(f"ray job logs {job}")
        assert "stopped; everything is saved" in log
        assert "dead" not in log
    assert losses[1] < losses[0]
