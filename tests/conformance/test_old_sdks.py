"""Older SDKs run the same program as the newest one, unchanged, on one server: `make sdks`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conformance.conftest import ALICE
from conformance.server_process import ServerProcess, Wire

SCRIPT = Path(__file__).with_name("sdk_script.py")
VERSIONS = ("0.22.3", "0.25.0", "0.30.4", "0.33.1", "0.36.0")
pytestmark = pytest.mark.slow


def run(server: ServerProcess, sdk: Path | None = None) -> dict[str, Any]:
    environment = os.environ | {"TINKER_BASE_URL": server.url, "TINKER_API_KEY": ALICE}
    if sdk is not None:
        environment["PYTHONPATH"] = str(sdk)
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def newest(server: ServerProcess) -> dict[str, Any]:
    seen = run(server)
    assert seen["losses"][-1] < seen["losses"][0]
    assert seen["custom"] < 2 * seen["losses"][-1]
    assert seen["loaded"] == pytest.approx(seen["trained"], rel=1e-5)
    return seen


def install(version: str, folder: Path) -> None:
    """Install an SDK alone: it uses the dependencies of the newest one, which are there."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
    subprocess.run([*pip, f"tinker=={version}"], check=True, capture_output=True, timeout=300)


@pytest.mark.parametrize("version", VERSIONS)
def test_an_older_sdk_sees_what_the_newest_does(
    server: ServerProcess, newest: dict[str, Any], tmp_path: Path, version: str
) -> None:
    install(version, tmp_path)
    seen = run(server, tmp_path)
    assert (seen.pop("version"), seen.pop("sampled")) == (version, newest["sampled"])
    for name, value in seen.items():
        assert value == pytest.approx(newest[name], rel=1e-4), name


@pytest.mark.parametrize("version", ["0.30.4", "0.33.1"])
def test_its_command_downloads_a_training_checkpoint(
    server: ServerProcess, tmp_path: Path, version: str
) -> None:
    """These versions ask for the archive of `weights/...`; later ones export it themselves."""
    sdk, into = tmp_path / "sdk", tmp_path / "into"
    install(version, sdk)
    wire = Wire(server.url, ALICE)
    model = wire.model()
    path = wire.result(wire.post("save_weights", model_id=model, seq_id=1, path="old"))["path"]
    environment = os.environ | {"TINKER_BASE_URL": server.url, "TINKER_API_KEY": ALICE}
    command = [sys.executable, "-m", "tinker.cli", "checkpoint", "download", path, "--output", str(into)]
    done = subprocess.run(
        command,
        env=environment | {"PYTHONPATH": str(sdk)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = {file.name for file in into.rglob("*") if file.is_file()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= found
