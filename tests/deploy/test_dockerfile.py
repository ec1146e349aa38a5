"""The image: its Dockerfile passes a linter, and agrees with the lock file, the extras and the manifests."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
TEXT = DOCKERFILE.read_text()


def lint(text: str) -> str:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("hadolint is not installed: make install")
    command = [hadolint, "--no-color", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False).stdout


def test_hadolint_finds_nothing() -> None:
    assert lint(TEXT) == ""
    assert "DL3002" in lint(TEXT.replace("USER 1000:1000", "USER root"))
    assert "DL3006" in lint(TEXT.replace("python:3.12-slim", "python"))


def test_versions_are_those_of_the_lock_file() -> None:
    installs = re.findall(r"pip install ([^\n]*)", TEXT)
    assert installs
    assert all("--constraint requirements.lock" in each for each in installs)


def test_its_extra_is_there() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (default,) = re.findall(r"^ARG EXTRAS=(\S+)$", TEXT, re.MULTILINE)
    assert default in extras


def test_the_server_is_not_root_and_may_write_to_its_volumes() -> None:
    last = re.findall(r"^FROM .*", TEXT, re.MULTILINE)[-1]
    stage = TEXT[TEXT.rindex(last) :]
    (user, group) = re.findall(r"^USER (\d+):(\d+)$", stage, re.MULTILINE)[-1]
    assert int(user) > 0
    (owner, its_group, made) = re.findall(r"install --directory --owner=(\d+) --group=(\d+) (.*)", stage)[0]
    assert (owner, its_group) == (user, group)

    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]["tinsmith"]
    mounts = {each.partition(":")[2] for each in compose["volumes"]}
    assert mounts == set(made.split()), "a new volume has the owner that its folder has in the image"

    documents = yaml.safe_load_all((ROOT / "deploy" / "kubernetes" / "tinsmith.yaml").read_text())
    (pod,) = (each["spec"]["template"]["spec"] for each in documents if each["kind"] == "Deployment")
    allowed = pod["securityContext"]
    assert allowed["runAsNonRoot"] is True
    assert (allowed["runAsUser"], allowed["fsGroup"]) == (int(user), int(group))
