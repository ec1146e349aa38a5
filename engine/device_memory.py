"""Memory of the devices: how much there is, and how much is free."""

from __future__ import annotations

from typing import Any

import jax

from . import host_memory


def free_bytes(device: Any = None) -> int | None:
    """Return the free bytes of an accelerator (by default the first); None on a CPU, or if unknown."""
    device = device or jax.local_devices()[0]
    if device.platform == "cpu":
        return None
    stats = device.memory_stats() or {}
    limit = stats.get("bytes_limit")
    return None if limit is None else int(limit - stats.get("bytes_in_use", 0))


def limit_bytes(device: Any = None) -> int | None:
    """Return the bytes of an accelerator (by default the first) that JAX may use; None if unknown."""
    device = device or jax.local_devices()[0]
    return None if device.platform == "cpu" else (device.memory_stats() or {}).get("bytes_limit")


def capacity_bytes(devices: int) -> int:
    """Return what a new engine may use of each of so many devices.

    On a CPU they share the machine's free memory. If nothing is known it is 16 GiB.
    """
    free = free_bytes()
    if free is None and jax.local_devices()[0].platform == "cpu":
        free = host_memory.free_bytes()
        free = None if free is None else free // devices
    return 16 << 30 if free is None else free
