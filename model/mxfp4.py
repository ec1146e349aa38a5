"""Reads matrices of experts in MXFP4 (OCP Microscaling Formats 1.0), as gpt-oss's files hold them.

A value is a 4-bit float (E2M1) times a power of two that 32 values along the input axis share. Files have
`X_blocks` [experts, out, in / 32, 16], two values to a byte with the low half first, and `X_scales`
[experts, out, in / 32], the exponents plus 127. Imports no array library but NumPy.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import UInt8

BLOCKS, SCALES = "_blocks", "_scales"
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array(_MAGNITUDES + tuple(-value for value in _MAGNITUDES), np.float32)
_BIAS = 127


class MxFp4:
    """An array [experts, in, out] that is computed, in bfloat16, when it is read.

    bfloat16 holds every value exactly. A slice of the last axis is such an array again.
    """

    def __init__(self, blocks: UInt8[np.ndarray, "E O G 16"], scales: UInt8[np.ndarray, "E O G"]):
        if blocks.ndim != 4 or blocks.shape[:-1] != scales.shape:
            raise ValueError(f"blocks of {blocks.shape} are not MXFP4 with scales of {scales.shape}")
        self._blocks, self._scales = blocks, scales

    @property
    def shape(self) -> tuple[int, ...]:
        experts, out, groups, size = self._blocks.shape
        return experts, groups * 2 * size, out

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, tuple) and index[0] is Ellipsis:
            return MxFp4(self._blocks[:, index[1]], self._scales[:, index[1]])
        return np.asarray(self)[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = np.empty(self.shape, ml_dtypes.bfloat16)
        for expert, (blocks, scales) in enumerate(zip(self._blocks, self._scales, strict=True)):
            halves = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:2], -1)
            values = np.ldexp(_VALUES[halves], scales[..., None].astype(np.int32) - _BIAS)
            whole[expert] = values.reshape(len(blocks), -1).T
        return whole if dtype is None else whole.astype(dtype)
