"""A terminal as a reader of the documentation has it: a folder, an environment, servers in the background."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
from docs.pages import executed

START_SECONDS = 180


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class Terminal:
    """`home` is both the home folder and the current one, where `.venv` is the tests' own environment. The
    documentation's ports, and names that stand for the reader's own, are replaced (`placeholders`)."""

    def __init__(self, home: Path, placeholders: dict[str, str]):
        self.home = home
        self.port = free_port()
        self._placeholders = placeholders | {"8000": str(self.port), "8123": str(free_port())}
        (home / ".venv").symlink_to(sys.prefix)
        self.environment = os.environ | {
            "HOME": str(home),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "JAX_PLATFORMS": "cpu",
            "TINSMITH_PORT": str(self.port),
            "TINKER_BASE_URL": f"http://127.0.0.1:{self.port}",
            "TINKER_API_KEY": "tml-local",
            "HF_HUB_OFFLINE": "1",
        }

    def mine(self, text: str) -> str:
        """The documentation's text, as it is here."""
        for placeholder, value in self._placeholders.items():
            text = re.sub(rf"(?<![\w.]){re.escape(placeholder)}(?![\w-])", value, text)
        return text

    def run(self, text: str, folder: Path | None = None, **environment: str) -> str:
        """Run commands, which must succeed; return what they print."""
        done = self.attempt(text, folder, **environment)
        assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
        return done.stdout

    def attempt(
        self, text: str, folder: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        executed(text)
        return subprocess.run(
            ["bash", "-eu", "-o", "pipefail", "-c", self.mine(text)],
            cwd=folder or self.home,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )

    def serve(self, text: str, **environment: str) -> Serving:
        executed(text)
        return Serving(self, self.mine(text), environment)


class Serving:
    """Commands of which the last is `tinsmith serve`. Its URL answers when this has been made."""

    def __init__(self, terminal: Terminal, text: str, environment: dict[str, str]):
        port = re.search(r"--port (\d+)", text)
        self.url = f"http://127.0.0.1:{port[1] if port else terminal.port}"
        self._log = terminal.home / f"serve-{time.monotonic_ns()}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                ["bash", "-eu", "-c", text],
                cwd=terminal.home,
                env=terminal.environment | environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._wait(lambda health: True)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait_for_engine(self) -> Serving:
        self._wait(lambda health: health["engine"]["ready"])
        return self

    def _wait(self, is_over) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self._process.poll() is None, self.log
            try:
                if is_over(httpx.get(f"{self.url}/health", timeout=5).json()):
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise TimeoutError(self.log)

    def interrupt(self) -> int:
        """Ctrl-C, which every process of the terminal gets; the exit status."""
        os.killpg(self._process.pid, signal.SIGINT)
        return self._process.wait(120)

    def kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
