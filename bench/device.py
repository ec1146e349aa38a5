"""Tests and measures this machine's GPU or TPU, and writes a page of figures and plots: `make gpu`.

    python bench/device.py                          # the tests, then Qwen3-0.6B's and 8B's shapes
    python bench/device.py --shapes qwen3-8b --tests none
    python bench/device.py --shapes tiny --allow-cpu --page /tmp/page      # a rehearsal without a device

First the tests of tests/device, then training (tokens/s, model FLOPs utilisation, peak memory), decoding
beside the limit of the memory's bandwidth, and the time to the first step with a cold and a warm compilation
cache, each in a process of its own with random weights. PAGE/DEVICE.json and the page PAGE/DEVICE.md are
written again after each measurement, so that it stays if the machine is taken away. The exit code is 1 if a
test failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from device_page import slug, write_page

HERE = Path(__file__).parent
ROOT = HERE.parent
TESTS = ("tests/device/test_kill_and_replay.py", "tests/device")
"""Each in a process of its own: a server cannot have a device while the tests' own process holds it."""
TRAINING = ((4, 2048), (1, 8192), (1, 32_768), (1, 131_072))
BATCHES = (1, 16, 64, 256)


def main() -> int:
    arguments = parse()
    environment = dict(os.environ)
    if arguments.allow_cpu:
        environment["JAX_PLATFORMS"] = "cpu"
    else:  # tests choose the CPU, and flags for it, where nothing is said
        environment |= {"JAX_PLATFORMS": "", "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}
    environment |= {"PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    found = _devices(environment)
    if found["platform"] == "cpu" and not arguments.allow_cpu:
        print(
            "JAX finds no GPU and no TPU here. Install the extra for the device (cuda12, cuda13 or tpu), or "
            "rehearse on this CPU: --shapes tiny --allow-cpu --quick --page FOLDER",
            file=sys.stderr,
        )
        return 2
    results: dict[str, Any] = {"tests": [], "cases": []}

    def keep() -> None:
        """Write the page as far as it is known; its name is the device's, which the first case tells."""
        if about := next((case for case in results["cases"] if "device" in case), None):
            arguments.page.mkdir(parents=True, exist_ok=True)
            (arguments.page / f"{slug(about['device'])}.json").write_text(
                json.dumps(results, indent=1) + "\n"
            )
            write_page(results, arguments.page)

    passed = True
    for path in () if arguments.tests == ["none"] else arguments.tests:
        others = [other for other in arguments.tests if other != path and other.startswith(path)]
        ran, tests = _run_tests(path, others, environment)
        passed, results["tests"] = passed and ran, results["tests"] + tests
    with tempfile.TemporaryDirectory() as scratch:
        for case in _cases(arguments, Path(scratch)):
            results["cases"].append(case | _measure(case, environment))
            print(json.dumps(results["cases"][-1]), flush=True)
            keep()
    return 0 if passed else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["qwen3-0.6b", "qwen3-8b"], help="models to measure")
    parser.add_argument(
        "--page",
        type=Path,
        default=ROOT / "docs" / "devices",
        help="the folder of the page (default: docs/devices)",
    )
    parser.add_argument(
        "--tests", nargs="+", default=list(TESTS), help="pytest paths, one process each, or none"
    )
    parser.add_argument("--allow-cpu", action="store_true", help="rehearse on the CPU, which is slow")
    parser.add_argument("--quick", action="store_true", help="short rows and small batches alone")
    return parser.parse_args()


def _cases(arguments: argparse.Namespace, scratch: Path) -> Iterator[dict[str, Any]]:
    """Yield the cases to measure, the shortest first."""
    training = ((1, 128),) if arguments.quick else TRAINING
    batches = (2,) if arguments.quick else BATCHES
    prompt, new_tokens = (16, 33) if arguments.quick else (512, 257)
    for shape in arguments.shapes:
        for cache in ("cold", "warm"):
            where = str(scratch / f"{shape}-start")
            yield {"case": "start", "shape": shape, "length": training[0][1], "cache": where, "state": cache}
        common = {"shape": shape, "cache": str(scratch / "xla")}
        for batch in batches:
            yield common | {"case": "decode", "batch": batch, "prompt": prompt, "new_tokens": new_tokens}
        for rows, length in training:
            yield common | {"case": "train", "rows": rows, "length": length}


def _measure(case: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    asked = {name: value for name, value in case.items() if name != "state"}
    if case["case"] == "start":
        asked["began"] = time.time()
    ran = subprocess.run(
        [sys.executable, HERE / "device_case.py"],
        input=json.dumps(asked) + "\n",
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    lines = [line for line in ran.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {"error": f"the process ended with {ran.returncode}"}


def _run_tests(path: str, without: list[str], environment: dict[str, str]) -> tuple[bool, list[dict]]:
    """Run the tests of a path; whether all passed, and each with its outcome and what it measured."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        ignored = [f"--ignore={other}" for other in without]
        command = [sys.executable, "-m", "pytest", "-v", path, *ignored, f"--junitxml={report}"]
        ran = subprocess.run(command, cwd=ROOT, env=environment)
        cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    outcomes = {"failure": "failed", "error": "failed", "skipped": "skipped"}
    tests = [
        {
            "name": case.get("name"),
            "outcome": next((outcomes[part.tag] for part in case if part.tag in outcomes), "passed"),
            "seconds": float(case.get("time", 0)),
            "measured": {each.get("name"): each.get("value") for each in case.iter("property")},
        }
        for case in cases
    ]
    return ran.returncode == 0, tests


def _devices(environment: dict[str, str]) -> dict[str, Any]:
    """Ask in another process: this one must not hold the device."""
    command = [sys.executable, "-m", "tinsmith.engine.devices"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(ran.stderr.strip().splitlines()[-1])
    return json.loads(ran.stdout)


if __name__ == "__main__":
    sys.exit(main())
