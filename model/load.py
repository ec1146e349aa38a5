"""Base weights from safetensors files straight into (sharded) device arrays.

The files are memory-mapped. For each stacked parameter JAX asks for the slices that this process's devices
hold; each is built from the mapped file once and handed over, so the host never holds a second copy of the
model, only the slice in hand.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from . import decoder, families
from .config import ModelConfig
from .sharding import make_mesh, shardings_for

_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


class WeightsError(ValueError):
    """The weight files do not hold the model that config.json describes; the message names the tensor."""


class MappedTensors:
    """The tensors of a folder's safetensors files as read-only views of mapped memory."""

    def __init__(self, folder: Path):
        self._maps: list[mmap.mmap] = []
        self._views: dict[str, np.ndarray] = {}
        for file in _weight_files(folder):
            self._map(file)

    def _map(self, file: Path) -> None:
        with file.open("rb") as opened:
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        header_size = int.from_bytes(mapped[:8], "little")
        if header_size > len(mapped) - 8:
            raise WeightsError(f"{file.name} is not a whole safetensors file")
        header = json.loads(mapped[8 : 8 + header_size])
        header.pop("__metadata__", None)
        self._maps.append(mapped)
        for name, entry in header.items():
            dtype = _DTYPES.get(entry["dtype"])
            if dtype is None:
                continue  # nothing that we compute with; asked for, it is reported as missing
            begin, end = entry["data_offsets"]
            if 8 + header_size + end > len(mapped):
                raise WeightsError(f"{file.name} is cut short: {name} lies beyond its end")
            count = (end - begin) // np.dtype(dtype).itemsize
            view = np.frombuffer(mapped, dtype, count, offset=8 + header_size + begin)
            self._views[name] = view.reshape(entry["shape"])

    def get(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The view of tensor `name`. Raises WeightsError when it is missing or of another shape."""
        view = self._views.get(name)
        if view is None:
            raise WeightsError(f"the weight files have no float tensor {name!r}")
        if view.shape != shape:
            raise WeightsError(f"{name} has shape {view.shape} in the file; config.json means {shape}")
        return view

    def forget_pages(self) -> None:
        """Let the kernel drop what has been read; the pages come back from the file when asked for."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for mapped in self._maps:
                mapped.madvise(mmap.MADV_DONTNEED)


def find_model(model: str) -> Path:
    """The folder of `model`: a local path, or a hub id (weights and tokenizer are downloaded and cached)."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{model} is neither a folder nor a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"]))


def load_base(folder: Path, config: ModelConfig, dtype: Any, mesh: Mesh | None = None) -> decoder.Base:
    """Load the base weights of `folder` as `dtype`, each leaf sharded over `mesh` by the rules table.

    Without a mesh: the first device. Raises WeightsError for files that do not fit `config`.
    """
    mesh = make_mesh() if mesh is None else mesh
    _, abstract = decoder.build(config, dtype)
    shardings = shardings_for(abstract, decoder.logical_axes(config), mesh)
    tensors = MappedTensors(Path(folder))
    names = families.tensor_names(config)

    def load(path: tuple, leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.Array:
        ours = ".".join(key.key for key in path)
        views = list(hf_views(tensors, ours, names[ours], leaf.shape))
        stacked = ours.startswith("layers.")

        def part(index: tuple[slice, ...]) -> np.ndarray:
            if not stacked:
                return np.ascontiguousarray(views[0][index], dtype=leaf.dtype)
            chosen = views[index[0]]
            inner = [view[index[1:]] for view in chosen]
            out = np.empty((len(inner), *inner[0].shape), leaf.dtype)
            for row, source in zip(out, inner, strict=True):
                row[...] = source
            return out

        array = jax.make_array_from_callback(leaf.shape, sharding, part)
        array.block_until_ready()
        tensors.forget_pages()
        return array

    return jax.tree_util.tree_map_with_path(load, abstract, shardings)


def hf_views(tensors: MappedTensors, ours: str, pattern: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """The file's views of one of our parameters, one per layer, in our orientation."""
    stacked = "{layer}" in pattern
    inner = shape[1:] if stacked else shape
    transposed = families.is_transposed(ours)
    for layer in range(shape[0] if stacked else 1):
        view = tensors.get(pattern.format(layer=layer), inner[::-1] if transposed else inner)
        yield view.T if transposed else view


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise WeightsError(f"{folder} has no .safetensors files")
    for file in files:
        if not file.exists():
            raise WeightsError(f"{file.name} is named by the index, but is not in {folder}")
    return files
