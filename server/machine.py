"""The devices that JAX finds on this machine."""

from __future__ import annotations

import os
import subprocess
import sys

import msgspec

from ..engine.device_catalogue import GPU_SHARE
from ..engine.messages import Devices

_ACCELERATORS = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/kfd", "/dev/accel0", "/dev/vfio/0", "/dev/vfio/vfio")
_PROBE_SECONDS = 300.0


def devices(needed: int) -> Devices:
    """The devices that the engine will have.

    They are looked for in a short-lived process, for this one has no JAX; on a machine without accelerators
    only if more than one device is `needed`. Raises ValueError saying in one line why JAX finds none.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "")
    surely_cpu = platforms == "cpu" or (not platforms and not any(map(os.path.exists, _ACCELERATORS)))
    if surely_cpu and needed <= 1:
        return Devices("cpu", 1)
    share = {"XLA_PYTHON_CLIENT_MEM_FRACTION": str(GPU_SHARE)}  # as the engine has (`engine_process`)
    quiet = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "3"}
    environment = share | os.environ | quiet
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
