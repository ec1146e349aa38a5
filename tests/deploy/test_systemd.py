"""docs/systemd.md: the unit, and the commands around it, as far as systemd is here to judge them."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from docs.pages import ROOT, block
from tinsmith.server.cli import app
from tinsmith.server.cli.command_line import unknown_names
from tinsmith.server.settings import Settings
from typer.main import get_command

PAGE = "systemd.md"
UNIT = (ROOT / "deploy" / "tinsmith.service").read_text()


def value(name: str) -> str:
    (found,) = re.findall(rf"^{name}=(.*)$", UNIT, re.MULTILINE)
    return found


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd here")
    unit = tmp_path / "tinsmith.service"
    unit.write_text(
        UNIT.replace("/opt/tinsmith/bin/tinsmith", "/bin/true").replace("User=tinsmith", "User=root")
    )
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert unit.name not in done.stderr, done.stderr


def test_the_unit_s_command_is_one_of_ours_and_a_stop_is_waited_for() -> None:
    program, command, *words = value("ExecStart").split()
    assert (program, command) == ("/opt/tinsmith/bin/tinsmith", "serve")
    known = {option for each in get_command(app).commands["serve"].params for option in each.opts}
    assert {word for word in words if word.startswith("--")} <= known
    assert value("TimeoutStopSec").endswith("min")
    minutes = int(value("TimeoutStopSec").removesuffix("min"))
    assert minutes * 60 > Settings.model_fields["stop_patience_seconds"].default


def test_every_folder_that_the_service_writes_to_is_its_own() -> None:
    """`ProtectSystem=strict` makes everything read-only but the folders that systemd makes for it."""
    words = shlex.split(value("ExecStart"))
    data, cache = (Path(words[words.index(option) + 1]) for option in ("--data-dir", "--cache-dir"))
    assert data == Path("/var/lib") / value("StateDirectory")
    assert cache == Path("/var/cache") / value("CacheDirectory")
    name, _, folder = value("Environment").partition("=")
    assert name == "HF_HOME"
    assert Path(folder).is_relative_to(cache), "the hub's downloads: home folders are hidden"


def test_the_page_shows_the_file_and_names_its_places() -> None:
    assert block(PAGE, "# A unit of systemd") == UNIT
    user, environment, installed = map(shlex.split, block(PAGE, "useradd").splitlines())
    assert user == ["useradd", "--system", value("User")]
    assert environment == ["python3", "-m", "venv", "/opt/tinsmith"]
    updated, restart = block(PAGE, "/opt/tinsmith/bin/python").splitlines()
    assert installed == [word for word in shlex.split(updated) if word != "--upgrade"]
    assert installed[0] == "/opt/tinsmith/bin/python"
    assert restart == "systemctl restart tinsmith"
    *systemctl, key = map(shlex.split, block(PAGE, "systemctl daemon-reload").splitlines())
    assert systemctl == [["systemctl", "daemon-reload"], ["systemctl", "enable", "--now", "tinsmith"]]
    assert key[:3] == ["sudo", "-u", value("User")]
    assert key[3] == value("ExecStart").split()[0]
    assert key[key.index("--data-dir") + 1] in value("ExecStart").split()


def test_the_secrets_are_variables_that_are_read() -> None:
    shown = block(PAGE, "# /etc/tinsmith.env")
    assert value("EnvironmentFile") == f"-{shown.splitlines()[0].removeprefix('# ')}"
    variables = dict(line.split("=", 1) for line in shown.splitlines()[1:])
    assert not unknown_names(variables)
    assert {name for name in variables if not name.startswith("TINSMITH_")} == {"HF_TOKEN"}
