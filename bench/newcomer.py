"""Measures a newcomer's first hour: `python bench/newcomer.py`, with any Python from 3.11.

Clones the repository, makes the environment, starts the server with the README's command and runs, in order,
the code of README.md and docs/export.md as it stands: a model is trained, downloaded, merged, and loaded in
PEFT and transformers. Nothing on the machine is used but pip's own cache. Prints a table and,
with `--json`, writes an object with the seconds of each step.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_FENCE = re.compile(r"^```[^\n`]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Newcomer:
    """A fresh clone in `folder`, and what is done there. `seconds`: of each step so far."""

    def __init__(self, folder: Path):
        self.clone = folder / "tinsmith"
        self.seconds: dict[str, float] = {}
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = str(listener.getsockname()[1])
        self._environment = os.environ | {
            "TINSMITH_CACHE_DIR": str(folder / "cache"),
            "TINSMITH_PORT": self.port,
            "HF_HUB_OFFLINE": "1",
        }

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time what is done inside."""
        began = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - began, 1)
        print(f"{name:<44}{self.seconds[name]:>8.1f} s", flush=True)

    def code(self, page: str, begins: str) -> str:
        """The page's first block that begins so, with the port of this server and the paths of this run."""
        found = next(
            text for text in _FENCE.findall((self.clone / page).read_text()) if text.startswith(begins)
        )
        return re.sub(r"\b8000\b", self.port, found)

    def run(self, command: str) -> str:
        """Run a command, which must succeed; return what it prints."""
        done = subprocess.run(
            ["bash", "-eu", "-c", command],
            cwd=self.clone,
            env=self._environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(f"{command}\n{done.stdout}{done.stderr}")
        return done.stdout

    def python(self, *codes: str) -> str:
        """Run blocks in one interpreter of the new environment; return what they print."""
        script = self.clone.parent / "script.py"
        script.write_text("\n".join(codes))
        return self.run(f".venv/bin/python {script}")

    @contextmanager
    def server(self, command: str) -> Iterator[None]:
        """A running server, whose engine is ready."""
        with (self.clone.parent / "server.log").open("w") as log:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {command}"],
                cwd=self.clone,
                env=self._environment,
                stdout=log,
                stderr=log,
            )
        try:
            while not self._ready():
                if process.poll() is not None:
                    sys.exit((self.clone.parent / "server.log").read_text())
                time.sleep(0.2)
            yield
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as answer:
                return json.load(answer)["engine"]["ready"]
        except OSError:
            return False


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="a file for the result")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        newcomer = Newcomer(Path(folder))
        with newcomer.step("clone"):
            subprocess.run(["git", "clone", "-q", ROOT, newcomer.clone], check=True)
        with newcomer.step("make install"):
            newcomer.run(newcomer.code("docs/quickstart.md", "make install"))
        with ExitStack() as running:
            with newcomer.step("start, with the model's download"):
                serve = newcomer.code("README.md", ".venv/bin/tinsmith serve").strip()
                running.enter_context(newcomer.server(serve))
            answers = _train_and_export(newcomer)
    total = round(sum(newcomer.seconds.values()), 1)
    print(f"{'all':<44}{total:>8.1f} s")
    answers = [answer.strip() for answer in answers]
    print("\n".join(answers))
    if len(set(answers)) != 1:
        sys.exit("the answers differ")
    if asked.json:
        asked.json.write_text(
            json.dumps({"seconds": newcomer.seconds | {"all": total}, "answer": answers[0]})
        )


def _train_and_export(newcomer: Newcomer) -> list[str]:
    """The answers of the server's sampler, of the adapter in PEFT and of the merged model in transformers."""
    export = "docs/export.md"
    with newcomer.step("train, sample and save"):
        printed = newcomer.python(
            newcomer.code("README.md", "import tinker"), newcomer.code(export, "path = client.save_state")
        )
    *_losses, answer, path = printed.strip().splitlines()
    shown = newcomer.code(export, "tinker://").strip()
    download = newcomer.code(export, "export TINKER_BASE_URL").replace(shown, path)
    with newcomer.step("download the adapter"):
        newcomer.run(download)
    exports, _download = download.split("\n", 1)  # a terminal keeps what was exported
    merge = newcomer.code(export, ".venv/bin/tinsmith checkpoints merge").replace(shown, path)
    with newcomer.step("merge, with the download"):
        newcomer.run(f"{exports}\n{merge}")
    with newcomer.step("load and ask both in transformers"):
        loaded = newcomer.python(
            newcomer.code(export, "from pathlib"), newcomer.code(export, "from transformers")
        )
    return [answer, *loaded.strip().splitlines()]


if __name__ == "__main__":
    main()
