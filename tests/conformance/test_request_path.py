"""Large training requests: the server keeps a device busy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench" / "request_path.py"


def test_a_device_seldom_waits_for_the_server(tmp_path: Path) -> None:
    """Two clients send batches of long datums to an engine that waits in place of a fast device."""
    report = tmp_path / "report.json"
    command = [sys.executable, str(BENCH), "--clients", "2", "--datums", "16", "--json", str(report)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    measured = json.loads(report.read_text())
    assert measured["tokens"] == 2 * 16 * 16384
    assert measured["waiting_and_host_share"] <= 0.03
