"""Writes a Hugging Face model folder from a stream of tensors: config, sharded safetensors, tokenizer.

The tensors come from an iterator. Only those of one file are in memory at a time, and their number need not
be known beforehand.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from . import digests, model_card, tokenizer_files
from .atomic import atomic_directory, size_bytes

Tensors = Iterable[tuple[str, np.ndarray]]
"""Hugging Face names and contiguous arrays."""

SHARD_BYTES = 4 << 30
COPIED = (
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    *tokenizer_files.FILES,
)
"""Files that are copied from the base model's folder if it has them."""


def copy_tokenizer(base_folder: Path, into: Path) -> None:
    """Copy the tokenizer's files."""
    _copy(tokenizer_files.FILES, base_folder, into)


def _copy(names: Iterable[str], base_folder: Path, into: Path) -> None:
    for name in names:
        if (base_folder / name).is_file():
            shutil.copyfile(base_folder / name, into / name)


def write_folder(
    directory: Path,
    tensors: Tensors,
    *,
    base_folder: Path,
    config: dict[str, Any],
    card: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write a model derived from that of `base_folder`. `config` has the changes to its config.json, and
    `card` is the text of its model card.

    A file holds up to `shard_bytes`; a larger tensor gets a separate file. The directory appears complete or
    not at all. Returns its size in bytes.
    """
    base_folder = Path(base_folder)
    with atomic_directory(directory) as writing:
        files = _write_shards(writing, tensors, shard_bytes)
        _name_shards(writing, files)
        hf_config = json.loads((base_folder / "config.json").read_text())
        for stated in (hf_config, hf_config.get("text_config") or {}):
            for key in ("dtype", "torch_dtype", "transformers_weights", "quantization_config"):
                stated.pop(key, None)
        _write_json(writing / "config.json", hf_config | config)
        _copy(COPIED, base_folder, writing)
        if card is not None:
            (writing / model_card.FILE).write_text(card)
        size = size_bytes(writing)
        digests.write(writing)
    return size


def _write_shards(writing: Path, tensors: Tensors, shard_bytes: int) -> list[dict[str, int]]:
    """Write files called `shard-i`. Returns the names and bytes of each file's tensors."""
    files: list[dict[str, int]] = []
    shard: dict[str, np.ndarray] = {}

    def close() -> None:
        save_file(shard, writing / f"shard-{len(files)}", {"format": "pt"})
        files.append({name: array.nbytes for name, array in shard.items()})
        shard.clear()

    filled = 0
    for name, array in tensors:
        if shard and filled + array.nbytes > shard_bytes:
            close()
            filled = 0
        shard[name] = array
        filled += array.nbytes
    close()
    return files


def _name_shards(writing: Path, files: list[dict[str, int]]) -> None:
    """Rename the files as transformers does, and write an index if there are several."""
    if len(files) == 1:
        (writing / "shard-0").rename(writing / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for index, sizes in enumerate(files):
        file = f"model-{index + 1:05d}-of-{len(files):05d}.safetensors"
        (writing / f"shard-{index}").rename(writing / file)
        weight_map |= dict.fromkeys(sizes, file)
    total_size = sum(size for sizes in files for size in sizes.values())
    index_of = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    _write_json(writing / "model.safetensors.index.json", index_of)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
