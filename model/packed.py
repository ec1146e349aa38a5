"""Reads matrices that files hold in fewer bits than floats, with scales in tensors beside them.

    mxfp4               4-bit floats of stacked experts (`mxfp4.py`)
    fp8                 DeepSeek-V3's files (arXiv:2412.19437, section 3.3): `X.weight` [out, in] in float8
                        (e4m3), and `X.weight_scale_inv` [out / 128, in / 128], rounded up. A value is the
                        number times the scale of its block of 128 x 128
    compressed-tensors  Kimi-K2's experts (format `pack-quantized`): `X.weight_packed` [out, in / 8] holds
                        eight integers of four bits in 32, the first one lowest, each plus 8. Every group of
                        inputs is multiplied with its scale in `X.weight_scale` [out, groups].
                        `X.weight_shape` repeats the shape

The product is computed in float32 where a matrix is read. Imports no array library but NumPy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Float, Int32

from .config import UnsupportedModelError
from .mxfp4 import BLOCKS, SCALES, MxFp4

_BLOCK = 128
_PER_WORD = 8
DTYPES: dict[str, Any] = {"U8": np.uint8, "I32": np.int32, "F8_E4M3": ml_dtypes.float8_e4m3fn}
"""The dtypes of packed tensors, by their safetensors names."""


class Packed:
    """A matrix [out, in], or its transpose, whose parts are computed in float32 when they are read."""

    def __init__(
        self, shape: tuple[int, int], read: Callable[[slice, slice], np.ndarray], transposed: bool = False
    ):
        """`read` returns the part of some rows and columns of the matrix as it lies in the file."""
        self._shape, self._read, self._transposed = shape, read, transposed

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape[::-1] if self._transposed else self._shape

    def swapaxes(self, one: int, other: int) -> Packed:
        return Packed(self._shape, self._read, not self._transposed)

    def __getitem__(self, index: Any) -> np.ndarray:
        cuts = [*index] if isinstance(index, tuple) else [index]
        if not all(isinstance(cut, slice) for cut in cuts):
            return np.asarray(self)[index]
        cuts += [slice(None)] * (2 - len(cuts))
        rows, columns = cuts[::-1] if self._transposed else cuts
        part = self._read(rows, columns)
        return part.T if self._transposed else part

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = self[:, :]
        return whole if dtype is None else whole.astype(dtype)


def _fp8(weight: np.ndarray, scale: np.ndarray) -> Packed:
    blocks = tuple(-(-size // _BLOCK) for size in weight.shape)
    if weight.ndim != 2 or scale.shape != blocks:
        raise ValueError(f"a float8 tensor of {weight.shape} has scales of {scale.shape}")

    def read(rows: slice, columns: slice) -> Float[np.ndarray, "O I"]:
        part = weight[rows, columns].astype(np.float32)
        row_block, column_block = (
            np.arange(size)[cut] // _BLOCK for size, cut in zip(weight.shape, (rows, columns), strict=True)
        )
        for block in np.unique(row_block):
            begin, end = np.searchsorted(row_block, [block, block + 1])
            part[begin:end] *= scale[block].astype(np.float32)[column_block]
        return part

    return Packed(weight.shape, read)


def _int4(packed: Int32[np.ndarray, "O W"], scale: np.ndarray) -> Packed:
    out, into = packed.shape[0], packed.shape[1] * _PER_WORD
    if scale.ndim != 2 or scale.shape[0] != out or into % scale.shape[1]:
        raise ValueError(f"4-bit integers of {(out, into)} have scales of {scale.shape}")

    def read(rows: slice, columns: slice) -> Float[np.ndarray, "O I"]:
        octets = np.ascontiguousarray(packed[rows]).view(np.uint8)
        values = np.stack([octets & 15, octets >> 4], axis=-1).astype(np.float32).reshape(len(octets), -1) - 8
        groups = values.reshape(len(octets), scale.shape[1], -1)
        groups *= scale[rows].astype(np.float32)[..., None]
        return values[:, columns]

    return Packed((out, into), read)


class _Format(NamedTuple):
    """The tensors, called name + suffix, in which a tensor is held, and their dtypes (None: any float)."""

    suffixes: tuple[str, ...]
    dtypes: tuple[str | None, ...]
    read: Callable[..., Packed | MxFp4]
    beside: tuple[str, ...] = ()
    """The suffixes of tensors that say nothing more."""


_FORMATS = (
    _Format((BLOCKS, SCALES), ("U8", "U8"), MxFp4),
    _Format(("", "_scale_inv"), ("F8_E4M3", None), _fp8),
    _Format(("_packed", "_scale"), ("I32", None), _int4, ("_shape",)),
)


def packed_as(dtypes: Mapping[str, str], name: str) -> tuple[str, ...]:
    """Return the names of the tensors that hold a packed one, or nothing. `dtypes` are the files' tensors."""
    found = _format(dtypes, name)
    return () if found is None else tuple(name + suffix for suffix in found.suffixes)


def companions(name: str) -> set[str]:
    """Return the names of all tensors that may lie beside or instead of one."""
    return {name + suffix for each in _FORMATS for suffix in (*each.suffixes, *each.beside)}


def packed_name(dtypes: Mapping[str, str], name: str) -> str:
    """Return the name of the packed tensor of which `name` is a part, or `name` itself."""
    for each in _FORMATS:
        for suffix in filter(None, (*each.suffixes, *each.beside)):
            if name.endswith(suffix) and packed_as(dtypes, whole := name.removesuffix(suffix)):
                return whole
    return name


def unpacked(dtypes: Mapping[str, str], name: str, tensors: Callable[[str], np.ndarray]) -> Packed | MxFp4:
    """Return the matrix that `packed_as` has found. Raises ValueError if the parts do not fit each other."""
    found = _format(dtypes, name)
    assert found is not None
    return found.read(*(tensors(name + suffix) for suffix in found.suffixes))


def _format(dtypes: Mapping[str, str], name: str) -> _Format | None:
    for each in _FORMATS:
        there = [dtypes.get(name + suffix) for suffix in each.suffixes]
        if all(
            found == wanted or (found in ("F32", "F16", "BF16") and wanted is None)
            for found, wanted in zip(there, each.dtypes, strict=True)
        ):
            return each
    return None


def refuse_unread(stated: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError if a `quantization_config` says something else than what is read here."""
    method = stated.get("quant_method")
    if method == "fp8":
        _require(stated, "weight_block_size", ([_BLOCK, _BLOCK],))
        _require(stated, "fmt", ("e4m3", None))
    if method == "compressed-tensors":
        _require(stated, "format", ("pack-quantized",))
        groups = stated.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise UnsupportedModelError(f"quantization_config: config_groups is {groups!r}")
        for name, group in groups.items():
            at = f"config_groups.{name}."
            weights = group.get("weights") if isinstance(group, dict) else None
            if not isinstance(weights, dict):
                raise UnsupportedModelError(f"quantization_config: {at}weights is {weights!r}")
            for key, known in _INT4.items():
                _require(weights, key, known, f"{at}weights.")
            _require(group, "input_activations", (None,), at)
            _require(group, "output_activations", (None,), at)
        _require(stated, "kv_cache_scheme", (None,))


_INT4: dict[str, tuple[Any, ...]] = {
    "num_bits": (4,),
    "type": ("int",),
    "symmetric": (True,),
    "strategy": ("group", "channel"),
    "actorder": (None,),
}


def _require(stated: Mapping[str, Any], key: str, known: tuple[Any, ...], at: str = "") -> None:
    if (value := stated.get(key)) not in known:
        raise UnsupportedModelError(
            f"quantization_config: {at}{key} is {value!r}; known: {', '.join(map(repr, known))}"
        )
