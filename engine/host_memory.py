"""Free memory of this machine, or of the container that this process is in. Imports no array library."""

from __future__ import annotations

from pathlib import Path


def free_bytes() -> int | None:
    """Return the bytes that a new process can have; None if unknown."""
    found = [value for value in (_of_machine(), *_of_containers()) if value is not None]
    return min(found, default=None)


def _of_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        (available,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        return int(available) * 1024
    except (OSError, ValueError):
        return None


def _of_containers() -> list[int]:
    """Yield what each control group of this process leaves: its limit, less what is in use and not cache."""
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
