"""Runs `laboratory.py` in the environment that `make laboratory` makes, one process for all programs."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
VENV = HERE.parents[1] / ".cache" / "accelerators" / "venv"


class Compiled:
    """One program's report (`laboratory.report`)."""

    def __init__(self, found: dict[str, Any]):
        assert "error" not in found, f"{found['case']}: {found['error']}"
        self.arguments: int = found["arguments"]
        self.temporaries: int = found["temporaries"]
        self.total: int = found["total"]
        self.calls: dict[str, int] = found["calls"]
        self.products: dict[str, float] = found["products"]
        self.cpu_seconds: float = found["cpu_seconds"]
        self.buffers = [(dtype, tuple(dims)) for dtype, dims in found["buffers"]]
        self._collectives = [(kind, dtype, tuple(dims), n) for kind, (dtype, dims), n in found["collectives"]]

    def gathers(self, *dims: int) -> int:
        """Count how often an array of these dimensions, in any order, is the result of an all-gather."""

        def sizes(some: tuple[int, ...]) -> list[int]:
            return sorted(size for size in some if size > 1)

        return sum(
            n
            for kind, _, found, n in self._collectives
            if kind == "all-gather" and sizes(found) == sizes(dims)
        )

    def gathered(self, wanted: Callable[[tuple[int, ...]], bool]) -> int:
        """Count the all-gathers that have a result whose dimensions are `wanted`."""
        return sum(n for kind, _, dims, n in self._collectives if kind == "all-gather" and wanted(dims))

    def moved(self, kind: str, dtype: str) -> int:
        """The elements of that type that all collectives of a kind give, by their number of executions."""
        return sum(n * prod(dims) for name, of, dims, n in self._collectives if (name, of) == (kind, dtype))


class _Laboratory:
    """A process of `laboratory.py`, which serves all tests of a pytest process and ends with it."""

    def __init__(self) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
        self._process = subprocess.Popen(
            [VENV / "bin" / "python", HERE / "laboratory.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        atexit.register(self._end)

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()

    def compile(self, target: str, case: str) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{target} {case}\n")
        self._process.stdin.flush()
        for line in self._process.stdout:  # plugins print lines of their own
            if line.startswith("{"):
                return json.loads(line)
        _laboratory.cache_clear()  # the next program gets a new process
        raise AssertionError(f"{target} {case}: the laboratory has ended; its errors are above")


_laboratory = functools.cache(_Laboratory)


@functools.cache
def compiled(target: str, case: str) -> Compiled:
    """Compile a case for a target. Skips the test if the environment is missing."""
    if not (VENV / ".installed").exists():
        pytest.skip("no compilers for accelerators: `make laboratory` installs them, with a python3.12")
    return Compiled(_laboratory().compile(target, case))
