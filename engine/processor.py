"""Features of the machine's processor that change what is compiled."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path


def instruction_sets() -> list[str]:
    """Return the names of its instruction sets; empty if unknown."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return flags.partition(":")[2].split()


def kind() -> str:
    """Return the machine type and a hash of its instruction sets, which decide where a program may run."""
    sets = " ".join(instruction_sets())
    return f"{platform.machine()}-{hashlib.sha256(sets.encode()).hexdigest()[:8]}"


def has_amx() -> bool:
    """Return whether it has tiles for products in bfloat16 (AMX)."""
    return "amx_bf16" in instruction_sets()


def memory_bytes() -> int:
    """Return the size of the machine's main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
