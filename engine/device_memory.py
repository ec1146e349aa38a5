"""Limits that follow from the device."""

from __future__ import annotations

import jax


def device_share(share: float, on_cpu: int) -> int:
    """So much of an accelerator's memory, in bytes; `on_cpu` on a CPU, or where the device does not tell."""
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None
    return int(limit * share) if limit else on_cpu
