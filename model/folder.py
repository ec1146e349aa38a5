"""Identifies a model folder and checks that its files are complete, before an engine starts.

Imports no array library, because the server process uses this module.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path

from .config import ModelConfig, read_config, stated_config
from .families import parameter_count, tensor_shapes
from .weight_files import EMBEDDING, HEAD, INDEX, SINGLE, Stored, WeightsError, check, find, headers

__all__ = [
    "INDEX",
    "SINGLE",
    "check",
    "digest",
    "headers",
    "parameter_count",
    "read_config",
    "stated_config",
    "tensor_shapes",
]

_DIGEST_VERSION = 1
_BLOCK_BYTES = 1 << 20
_HASHED_BYTES = 512 << 20
_NOT_ARITHMETIC = ("max_sequence_length", "eos_token_ids")


def digest(folder: Path, config: ModelConfig) -> str:
    """Return a hash of the model's arithmetic (`config`) and weights, which identifies the model.

    It does not depend on the folder's location, on how tensors are spread over files, or on other content of
    the files. Beyond 512 MB of weights, only every n-th MB and the end of every tensor are hashed, because
    training changes all weights. Raises WeightsError or OSError.
    """
    hashed = hashlib.blake2b(digest_size=16)
    hashed.update(_arithmetic(config).encode())
    stored = headers(folder)
    tensors = {name: _stored(stored, name) for name in sorted(tensor_shapes(config))}
    total = sum(each.end - each.begin for each in tensors.values())
    every = max(1, -(-total // _HASHED_BYTES))
    files = {each.file: each.file.open("rb") for each in tensors.values()}
    try:
        for name, tensor in tensors.items():
            hashed.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
            blocks = -(-(tensor.end - tensor.begin) // _BLOCK_BYTES)
            for block in sorted({*range(0, blocks, every), blocks - 1} - {-1}):
                begin = tensor.begin + block * _BLOCK_BYTES
                size = min(_BLOCK_BYTES, tensor.end - begin)
                hashed.update(os.pread(files[tensor.file].fileno(), size, begin))
    finally:
        for file in files.values():
            file.close()
    return f"{_DIGEST_VERSION}-{hashed.hexdigest()}"


def _stored(stored: dict[str, Stored], name: str) -> Stored:
    found = find(stored, name)
    if found is None and name == EMBEDDING:
        found = stored.get(HEAD)
    if found is None:
        raise WeightsError(f"the weight files have no float tensor {name!r}")
    return found


def _arithmetic(config: ModelConfig) -> str:
    """Return the fields that differ from their defaults, so that fields added later change no digest."""
    fields = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in _NOT_ARITHMETIC and value != field.default:
            fields[field.name] = value
    scaling = fields.pop("rope_scaling", None)
    if scaling is not None:
        fields |= {
            f"rope_scaling.{field.name}": getattr(scaling, field.name)
            for field in dataclasses.fields(scaling)
            if getattr(scaling, field.name) != field.default
        }
    return repr(sorted(fields.items()))
