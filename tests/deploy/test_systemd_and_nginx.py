"""The unit and the proxy's configuration, as far as their own programs are here to judge them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tinsmith.server.cli import app
from tinsmith.server.settings import Settings
from typer.main import get_command

DEPLOY = Path(__file__).parents[2] / "deploy"


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd here")
    unit = tmp_path / "tinsmith.service"
    text = (DEPLOY / "tinsmith.service").read_text()
    unit.write_text(
        text.replace("/opt/tinsmith/bin/tinsmith", "/bin/true").replace("User=tinsmith", "User=root")
    )
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert unit.name not in done.stderr, done.stderr


def test_the_unit_s_command_is_one_of_ours_and_a_stop_is_waited_for() -> None:
    text = (DEPLOY / "tinsmith.service").read_text()
    command = re.search(r"^ExecStart=/opt/tinsmith/bin/tinsmith serve (.*)$", text, re.MULTILINE)
    assert command is not None
    known = {option for each in get_command(app).commands["serve"].params for option in each.opts}
    assert {word for word in command[1].split() if word.startswith("--")} <= known
    minutes = re.search(r"^TimeoutStopSec=(\d+)min$", text, re.MULTILINE)
    assert minutes is not None
    assert int(minutes[1]) * 60 > Settings.model_fields["stop_patience_seconds"].default


def test_the_proxy_lets_streams_large_bodies_and_long_polls_through() -> None:
    text = (DEPLOY / "nginx.conf").read_text()
    assert text.count("{") == text.count("}")
    for line in ("proxy_buffering off;", "proxy_request_buffering off;", "proxy_http_version 1.1;"):
        assert line in text
    assert "client_max_body_size 4g;" in text  # the largest that this server accepts
    assert Settings.model_fields["max_import_bytes"].default == 4 << 30


def test_nginx_takes_its_file(tmp_path: Path) -> None:
    if shutil.which("nginx") is None:
        pytest.skip("no nginx here")
    main = tmp_path / "nginx.conf"
    main.write_text(f"events {{}}\nhttp {{ include {DEPLOY / 'nginx.conf'}; }}\n")
    done = subprocess.run(["nginx", "-t", "-c", str(main)], capture_output=True, text=True, check=False)
    assert "syntax is ok" in done.stderr or "cannot load certificate" in done.stderr, done.stderr
