"""What the machine's processor can do, where it changes what is compiled."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path


def instruction_sets() -> list[str]:
    """The names of its instruction sets; none where the system does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return flags.partition(":")[2].split()


def kind() -> str:
    """The machine type and a hash of its instruction sets: a program compiled for another may not run."""
    sets = " ".join(instruction_sets())
    return f"{platform.machine()}-{hashlib.sha256(sets.encode()).hexdigest()[:8]}"


def has_amx() -> bool:
    """Whether products in bfloat16 have tiles of their own (AMX)."""
    return "amx_bf16" in instruction_sets()


def memory_bytes() -> int:
    """The machine's main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
