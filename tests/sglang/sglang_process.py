"""A real SGLang on the CPU, in an environment of its own; see stubs/ for what it does without."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx

STUBS = Path(__file__).with_name("stubs")
START_SECONDS = 240
_DIE_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG

OPTIONS = (
    *("--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1"),
    # The CPU's usual backends are Intel's AMX; float32 in plain PyTorch is exact.
    *(
        "--attention-backend",
        "torch_native",
        "--sampling-backend",
        "pytorch",
        "--lora-backend",
        "torch_native",
    ),
    *(
        "--disable-overlap-schedule",
        "--disable-cuda-graph",
        "--skip-server-warmup",
        "--grammar-backend",
        "none",
    ),
    # An idle scheduler would spin, and take its pages from all the memory there is.
    *("--sleep-on-idle", "--max-total-tokens", "8192", "--context-length", "512"),
)
LORA = (
    *("--enable-lora", "--lora-target-modules", "all", "--max-lora-rank", "16"),
    *("--max-loras-per-batch", "3", "--max-loaded-loras", "6"),
)
ENVIRONMENT = {
    "PYTHONPATH": str(STUBS),
    "SGLANG_USE_CPU_ENGINE": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


class SglangProcess:
    """`restart` comes back on the same port, with nothing that it was given."""

    def __init__(self, python: Path, model: Path, log: Path, *options: str):
        self.model = model
        self.port = _free_port()
        self._command = [
            *(str(python), "-m", "sglang.launch_server", "--model-path", str(model)),
            *("--port", str(self.port), *OPTIONS, *options),
        ]
        self._log = log
        self.process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def start(self) -> SglangProcess:
        """Until it answers."""
        with self._log.open("a") as log:
            self.process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | ENVIRONMENT,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"SGLang ended:\n{self.log[-8000:]}"
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/ready", timeout=5).status_code == 200:
                    return self
            time.sleep(0.1)
        self.kill()
        raise TimeoutError(f"SGLang did not become ready:\n{self.log[-8000:]}")

    def kill(self) -> None:
        """It and its children, at once."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    stop = kill  # it has nothing to save

    def reset_weights(self) -> None:
        """The weights that it has after a start."""
        self.load_weights(self.model, "default")

    def load_weights(self, folder: Path, version: str) -> None:
        # A request that has just ended is one that runs, to an update for a moment.
        assert httpx.post(f"{self.url}/flush_cache?timeout=60", timeout=65).status_code == 200
        update = {"model_path": str(folder), "weight_version": version}
        answer = httpx.post(f"{self.url}/update_weights_from_disk", json=update, timeout=60).json()
        assert answer["success"], answer

    @property
    def weight_version(self) -> str:
        return httpx.get(f"{self.url}/model_info", timeout=60).json()["weight_version"]

    def restart(self) -> None:
        self.kill()
        self.start()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
