"""Measures the largest resident memory of this process since `reset_peak` (Linux)."""

import ctypes
from pathlib import Path


def release() -> None:
    """Return freed memory to the system, for other processes, and so that later peaks do not include it."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float:
    """Return the peak in megabytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
