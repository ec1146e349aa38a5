"""The cookbook's programs, run as they are: `python -m tinker_cookbook.recipes...` in a folder of ours."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 1500


@dataclass(frozen=True)
class Run:
    """The contents of a program's log folder."""

    folder: Path

    def _lines(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return self._lines("metrics.jsonl")

    @property
    def checkpoints(self) -> list[dict[str, Any]]:
        return self._lines("checkpoints.jsonl")

    def column(self, name: str) -> list[float]:
        return [row[name] for row in self.metrics if name in row]


class Cookbook:
    """An interpreter with the cookbook, the folder that its programs run in, and the server they speak to."""

    def __init__(self, python: Path, folder: Path, url: str):
        self.python, self.folder = python, folder
        self.environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
            "TINKER_BASE_URL": url,
            "TINKER_API_KEY": "tml-cookbook",
            "TINKER_TELEMETRY": "0",
            "TINKER_COOKBOOK_RUNS_DIR": str(folder / "runs"),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(folder / "datasets-cache"),
            "TRANSFORMERS_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }

    def _log(self, name: str) -> Path:
        path = self.folder / "logs" / f"{name}.log"
        path.parent.mkdir(exist_ok=True)
        return path

    def execute(
        self, name: str, *arguments: str | Path, timeout: float = TIMEOUT_SECONDS, **environment: str
    ) -> str:
        """The output of an interpreter with these arguments, which must end well."""
        with self._log(name).open("w+") as log:
            done = subprocess.run(
                [str(self.python), *map(str, arguments)],
                cwd=self.folder,
                env=self.environment | environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=timeout,
                check=False,
            )
            log.seek(0)
            output = log.read()
        assert done.returncode == 0, f"{name} ended with {done.returncode}:\n{output[-6000:]}"
        return output

    def recipe(self, module: str, name: str, *flags: str) -> Run:
        """`tinker_cookbook.recipes.<module>` to its end, with its log in `runs/<name>`."""
        run = Run(self.folder / "runs" / name)
        self.execute(name, "-m", f"tinker_cookbook.recipes.{module}", f"log_path={run.folder}", *flags)
        return run

    def kill_after(self, steps: int, module: str, name: str, *flags: str) -> Run:
        """The same, killed (SIGKILL) when it has reported so many steps."""
        run = Run(self.folder / "runs" / name)
        command = [self.python, "-m", f"tinker_cookbook.recipes.{module}", f"log_path={run.folder}", *flags]
        with self._log(f"{name}-killed").open("w") as log:
            process = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=log, stderr=subprocess.STDOUT
            )
            deadline = time.monotonic() + TIMEOUT_SECONDS
            while len(run.metrics) < steps:
                assert process.poll() is None, f"{name} ended too early: {self._log(f'{name}-killed')}"
                assert time.monotonic() < deadline, f"{name} reported {len(run.metrics)} steps"
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
            process.wait()
        return run
