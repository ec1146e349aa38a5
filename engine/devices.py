"""`python -m tinsmith.engine.devices`: print the devices that JAX finds, as JSON (messages.Devices).

If there is none it exits with 1, and the reason as the last line on standard error.
"""

from __future__ import annotations

import subprocess
import sys

import jax
import msgspec

from .device_memory import free_bytes
from .messages import Devices


def main() -> int:
    try:
        found = jax.devices()
    except RuntimeError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    free = [size for size in (free_bytes(found[0]), _free_of_nvidia(found[0])) if size is not None]
    print(msgspec.json.encode(Devices(found[0].platform, len(found), min(free, default=None))).decode())
    return 0


def _free_of_nvidia(device: jax.Device) -> int | None:
    """Return the free memory of the fullest GPU, from NVIDIA's driver; None without it."""
    if device.platform == "cpu" or "nvidia" not in device.device_kind.lower():
        return None
    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, check=True, timeout=60, text=True).stdout
        return min(int(line) for line in answer.split()) << 20
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


if __name__ == "__main__":
    sys.exit(main())
