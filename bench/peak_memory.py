"""The largest resident memory of this process since `reset_peak` (Linux)."""

import ctypes
from pathlib import Path


def release() -> None:
    """Give freed memory back to the system: several sides share a machine, and no peak is an old one."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float:
    """Megabytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
