"""Numerical promises of a backend: true float32, and equal bits from run to run."""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp

from .xla_flags import is_deterministic


def set_precision(dtype: Any, platform: str) -> None:
    """Let products of float32 be computed in float32.

    By default TPUs compute them in bfloat16, and GPUs in TensorFloat-32. A CPU has no such shortcut. Programs
    in bfloat16 are not affected: their few float32 products have operands of that precision.
    """
    if platform != "cpu" and jnp.dtype(dtype) == jnp.float32:
        jax.config.update("jax_default_matmul_precision", "highest")


def promise(platform: str) -> str:
    """Return a line for the log: whether the same program gives the same bits each time on this backend."""
    if platform != "gpu":
        return "results are equal to the bit from run to run"
    if is_deterministic(os.environ.get("XLA_FLAGS", "")):
        return (
            "XLA is told to use deterministic operations alone: results are equal to the bit from run to run"
        )
    return "XLA may use operations that are not deterministic: a replay may differ in the last bits"
