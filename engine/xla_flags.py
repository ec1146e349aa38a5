"""XLA flags that make GPUs deterministic (openxla.org/xla/determinism). Imports no array library."""

from __future__ import annotations

import re

_EXCLUDE = "--xla_gpu_exclude_nondeterministic_ops"
_STATED = re.compile(r"--xla_gpu_(?:exclude_nondeterministic|deterministic)_ops(?:=(\S+))?")


def deterministic(flags: str) -> str:
    """Return XLA_FLAGS with deterministic operations, unless `flags` already mention them.

    Operations with a deterministic form use it (scatters, products, cuDNN's attention), and autotuning
    continues. Its choices are kept with the compiled programs, in JAX's persistent cache.
    """
    return flags if _STATED.search(flags) else f"{flags} {_EXCLUDE}=true".strip()


def is_deterministic(flags: str) -> bool:
    """Return whether XLA_FLAGS ask for deterministic operations."""
    stated = [value if value is not None else "true" for value in _STATED.findall(flags)]
    return any(value.lower() in ("", "true", "1") for value in stated)
