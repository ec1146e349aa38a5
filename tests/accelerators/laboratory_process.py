"""Runs `laboratory.py` in the environment that `make laboratory` makes."""

from __future__ import annotations

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


def compile_for(target: str, *cases: str) -> dict[str, Compiled]:
    """Compile the cases for a target in one process; by case. Skips the test without the environment."""
    if not (VENV / ".installed").exists():
        pytest.skip("no compilers for accelerators: `make laboratory` installs them, with a python3.12")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    ran = subprocess.run(
        [VENV / "bin" / "python", HERE / "laboratory.py", target, *cases],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    return {each["case"]: Compiled(each) for each in found}
