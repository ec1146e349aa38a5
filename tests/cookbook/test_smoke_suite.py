"""The cookbook's own tests of its recipes, from its source archive, on our server.

`COOKBOOK_TESTS="shorter or rlhf"` runs those that pytest's `-k` would choose, also of what is left out
otherwise.
"""

from __future__ import annotations

import os
import subprocess
import tarfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest
from cookbook.programs import Cookbook

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]
VERSION = "0.6.1"
LEFT_OUT = {
    "vlm_classifier": "image data sets from the hub, and a model that sees",
    "forecasting": "questions that it downloads from an address",
    # 34 words, 32 games each, evaluated before and after: no flag that its test leaves to us makes it less.
    "twenty_questions": "88,000 samples, of which two cores give 30 to 70 a second",
}


@pytest.fixture(scope="module")
def suite(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cookbook's tests alone, beside the installed package, and a `uv run` that builds no environment."""
    folder = tmp_path_factory.mktemp("suite")
    pip = [python, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "tinker-cookbook"]
    subprocess.run([*pip, "-d", folder, f"tinker-cookbook=={VERSION}"], check=True, timeout=600)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    (folder / f"tinker_cookbook-{VERSION}" / "tests").rename(folder / "tests")
    uv = folder / "bin" / "uv"
    uv.parent.mkdir()
    uv.write_text('#!/bin/sh\nshift\nexec "$@"\n')
    uv.chmod(0o755)
    return folder


def test_its_own_tests_pass(
    cookbook: Cookbook, python: Path, suite: Path, seen: Callable[[str, str], None]
) -> None:
    report = suite / "report.xml"
    chosen = os.environ.get("COOKBOOK_TESTS", "")
    without = [
        f"--ignore={suite}/tests/recipes/test_recipe_{name}.py" for name in LEFT_OUT if name not in chosen
    ]
    try:
        cookbook.execute(
            "smoke",
            *("-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", suite, f"--junitxml={report}"),
            *(*without, "-k", chosen, suite / "tests" / "recipes"),
            timeout=7000,
            PATH=os.pathsep.join((str(suite / "bin"), str(python.parent), os.environ["PATH"])),
            PYTHONPATH=str(suite),
            SMOKE_TEST_TIMEOUT=os.environ.get("SMOKE_TEST_TIMEOUT", "1500"),
        )
    finally:
        for case in ElementTree.parse(report).iter("testcase"):
            verdict = "passes" if not len(case) else case[0].get("message", case[0].tag).splitlines()[0]
            seen(f"`tests/recipes`: `{case.get('name')}`", f"{verdict}, {float(case.get('time', 0)):.0f} s")
