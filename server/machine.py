"""What this machine has room for: its memory, and the devices that JAX finds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec

from ..engine.messages import Devices

_ACCELERATORS = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/kfd", "/dev/accel0", "/dev/vfio/0", "/dev/vfio/vfio")
_PROBE_SECONDS = 300.0


def free_memory() -> int | None:
    """Bytes that a new process can have, in this container if it is in one; None where nobody tells."""
    found = [value for value in (_of_machine(), *_of_containers()) if value is not None]
    return min(found, default=None)


def devices(needed: int) -> Devices:
    """The devices that the engine will have.

    They are looked for in a short-lived process, for this one has no JAX; on a machine without accelerators
    only if more than one device is `needed`. Raises ValueError saying in one line why JAX finds none.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "")
    surely_cpu = platforms == "cpu" or (not platforms and not any(map(os.path.exists, _ACCELERATORS)))
    if surely_cpu and needed <= 1:
        return Devices("cpu", 1)
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-m", "tinsmith.engine.devices"]
    try:
        probe = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PROBE_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"JAX did not find its devices within {_PROBE_SECONDS:.0f} s") from None
    if probe.returncode != 0:
        lines = probe.stderr.decode(errors="replace").strip().splitlines() or ["no reason was given"]
        raise ValueError(f"JAX finds no device: {lines[-1][:300]}")
    return msgspec.json.decode(probe.stdout.splitlines()[-1], type=Devices)


def _of_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        (available,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        return int(available) * 1024
    except (OSError, ValueError):
        return None


def _of_containers() -> list[int]:
    """What each control group of this process leaves: its limit, less what is in use and not cache."""
    left = []
    for limit, used, statistics, cache in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "inactive_file",
        ),
    ):
        root = Path("/sys/fs/cgroup")
        try:
            total, current = int((root / limit).read_text()), int((root / used).read_text())
            rows = (line.split() for line in (root / statistics).read_text().splitlines())
            reclaimable = next((int(row[1]) for row in rows if row[0] in (cache, f"total_{cache}")), 0)
        except (OSError, ValueError):  # no such group, or "max": no limit
            continue
        left.append(total - current + reclaimable)
    return left
