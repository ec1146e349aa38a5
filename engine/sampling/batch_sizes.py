"""Batch sizes of the sampler: how much one program computes at a time."""

from __future__ import annotations

from typing import NamedTuple

from ...model.kernels.backends import Backend
from ..device_memory import limit_bytes


class BatchSizes(NamedTuple):
    """`slots` sequences are decoded together, `steps` tokens of each per call.

    `prefill` is the most tokens of prompts per call, a multiple of the page size."""

    slots: int
    prefill: int
    steps: int


def batch_sizes(backend: Backend) -> BatchSizes:
    """Return the sizes for a device.

    Decoding reads all weights once per token of the whole batch, so more slots cost little until their keys
    and values are as large as the weights. Prefill fills an accelerator's products with a few thousand
    tokens. The more memory a device has, the faster it is, and the longer such a chunk may be: other work
    waits for one.
    """
    if backend == "cpu":
        return BatchSizes(64, 512, 16)
    gib = (limit_bytes() or 0) / 2**30
    if gib >= 96:
        return BatchSizes(256, 4096, 32)
    return BatchSizes(128, 4096, 32) if gib >= 32 else BatchSizes(64, 2048, 32)
