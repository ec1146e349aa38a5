"""`bench/device.py`, which `make gpu` runs, from its tests to its page: a rehearsal on the CPU, tiny."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .pages import ROOT

pytest.importorskip("matplotlib")


def device(*options: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "bench" / "device.py", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.timeout(1200)
def test_a_rehearsal_goes_from_the_tests_to_the_page(tmp_path: Path) -> None:
    ran = device(
        *("--shapes", "tiny", "--allow-cpu", "--quick", "--page", tmp_path),
        *("--tests", "tests/device/test_grouped_product.py"),
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    results = json.loads((tmp_path / "cpu.json").read_text())
    assert [case["case"] for case in results["cases"]] == ["start", "start", "decode", "train"]
    assert not [case for case in results["cases"] if "error" in case]
    assert all(
        value > 0 for case in results["cases"] for value in case.values() if isinstance(value, int | float)
    )
    assert {test["outcome"] for test in results["tests"]} == {"passed"}
    page = (tmp_path / "cpu.md").read_text()
    assert "2 passed." in page
    assert "| tiny | 1 x 128 |" in page
    assert "| tiny | 2 | 16 + 33 |" in page
    for plot in ("cpu-training.svg", "cpu-decoding.svg"):
        assert f"]({plot})" in page
        assert (tmp_path / plot).read_text().rstrip().endswith("</svg>")


def test_without_a_device_it_says_what_to_do() -> None:
    ran = device("--shapes", "tiny")
    assert ran.returncode == 2
    assert "no GPU and no TPU" in ran.stderr
    assert "--allow-cpu" in ran.stderr
