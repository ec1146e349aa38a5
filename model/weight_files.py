"""Finds and reads the safetensors files of a model folder. Imports no array library.

Reference: transformers 5, `modeling_utils._get_resolved_checkpoint_files`: model.safetensors, else the files
that model.safetensors.index.json names; a tensor in a later file replaces one in an earlier file. Other files
in the folder (shards of an older save, consolidated.safetensors, adapters, .bin files) are ignored.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import ml_dtypes
import numpy as np

from . import packed
from .config import ModelConfig, read_json
from .families import FAMILIES, Parameter, in_files, parameters, tensor_shapes
from .mxfp4 import MxFp4
from .packed import Packed

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
"""The names of the embedding, after the prefix (`ModelConfig.prefix`), and of the head."""
DTYPES: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
"""The dtypes of tensors that can be read, by their safetensors names."""
_COPIED_DTYPES = {
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (16, 32, 64)},
    "BOOL": np.dtype(bool),
}
"""Those of tensors that are only ever copied (`copied`)."""

_MAX_HEADER_BYTES = 100 << 20  # as in the safetensors library
_COMPARED_BYTES = 64 << 20
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_BASE_PREFIX = "model."
T = TypeVar("T")


class WeightsError(ValueError):
    """The weight files do not hold the model that config.json describes; the message names the tensor."""


class Stored(NamedTuple):
    """The description of a tensor and its place in a file. `dtype` is its safetensors name: F32, BF16, ..."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold the model's weights.

    Raises WeightsError if there are none or one is missing."""
    explicit = (read_json(folder / "config.json") or {}).get("transformers_weights")
    if explicit is not None and (not isinstance(explicit, str) or Path(explicit).name != explicit):
        raise WeightsError(f"transformers_weights {explicit!r} is not the name of a file in {folder}")
    name = explicit or (SINGLE if (folder / SINGLE).is_file() else INDEX)
    if not name.endswith(".index.json"):
        return [_present(folder, name, "config.json")]
    if not (folder / name).is_file():
        raise WeightsError(_why_no_weights(folder))
    weight_map = (read_json(folder / name) or {}).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{name} in {folder} has no weight_map: it names no files")
    files = sorted(set(map(str, weight_map.values())))
    return [_present(folder, file, "the index") for file in files]


def headers(folder: Path) -> dict[str, Stored]:
    """Return the descriptions of all tensors in the model's files, by name, without reading the tensors.

    Raises WeightsError or OSError."""
    found: dict[str, Stored] = {}
    for file in weight_files(folder):
        found |= header(file)
    return found


def header(file: Path) -> dict[str, Stored]:
    """Return the descriptions of the tensors in one file.

    Raises WeightsError if it is damaged or cut short."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length == int.from_bytes(_LFS_POINTER[:8], "little"):
            raise WeightsError(f"{file.name} is a pointer of git-lfs, not the file itself: run git lfs pull")
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise WeightsError(f"{file.name} is not a whole safetensors file")
        try:
            entries = json.loads(opened.read(length))
            entries.pop("__metadata__", None)
            found = {name: _stored(file, entry, 8 + length) for name, entry in entries.items()}
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
            raise WeightsError(f"the header of {file.name} is damaged") from None
    for name, stored in found.items():
        if stored.end > size:
            raise WeightsError(f"{file.name} is cut short: {name} lies beyond its end")
        if (dtype := (DTYPES | packed.DTYPES).get(stored.dtype)) is not None:
            expected = prod(stored.shape) * np.dtype(dtype).itemsize
            if stored.begin < 8 + length or stored.end - stored.begin != expected:
                raise WeightsError(f"the header of {file.name} is damaged: {name} has not its shape's size")
    return found


def find(tensors: Mapping[str, T], name: str) -> T | None:
    """Find a tensor by its Hugging Face name.

    Files of a model without its head (LlamaModel and so on) have names without the prefix `model.`."""
    found = tensors.get(name)
    return tensors.get(name.removeprefix(_BASE_PREFIX)) if found is None else found


def check(folder: Path, config: ModelConfig) -> None:
    """Check by the headers that the files hold every tensor of `config`.

    Raises WeightsError naming a tensor that is missing or does not fit."""
    stored = headers(folder)
    for name, shape in tensor_shapes(config).items():
        if name.endswith(EMBEDDING) and config.tie_embeddings and find(stored, name) is None:
            name = in_files(config, HEAD)
        if parts := packed_as(stored, name):
            _check_packed(name, stored, parts, shape)
            continue
        found = find(stored, name)
        if found is None:
            raise WeightsError(_missing(name, stored))
        if found.dtype not in DTYPES:
            raise WeightsError(
                f"{name} has dtype {found.dtype} in {found.file.name}; known: {', '.join(DTYPES)}"
            )
        if found.shape != shape:
            raise WeightsError(_misshapen(name, found.shape, shape))


def packed_as(stored: Mapping[str, Stored], name: str) -> tuple[str, ...]:
    """Return the names of the tensors that hold a packed one (`packed`), or nothing."""
    return packed.packed_as(
        {each: stored[each].dtype for each in packed.companions(name) & stored.keys()}, name
    )


def _check_packed(
    name: str, stored: Mapping[str, Stored], parts: tuple[str, ...], shape: tuple[int, ...]
) -> None:
    """Check a packed tensor by the shapes of its parts."""
    dtypes = {each: stored[each].dtype for each in parts}

    def empty(part: str) -> np.ndarray:
        zero = np.zeros((), (DTYPES | packed.DTYPES)[stored[part].dtype])
        return np.broadcast_to(zero, stored[part].shape)

    try:
        there = packed.unpacked(dtypes, name, empty).shape
    except ValueError as error:
        raise WeightsError(f"{name}: {error}") from None
    if there != shape:
        raise WeightsError(_misshapen(name, there, shape))


def unread(folder: Path, config: ModelConfig) -> list[str]:
    """Return the tensors that `config` does not use, except tables that every reader computes itself."""
    names = set(tensor_shapes(config))
    names |= {each for name in names for each in packed.companions(name)}
    names |= {name.removeprefix(_BASE_PREFIX) for name in names}
    if config.tie_embeddings:
        names.add(in_files(config, HEAD))
    return sorted(name for name in headers(folder) if name not in names and "rotary_emb.inv_freq" not in name)


def has_weights(folder: Path) -> bool:
    """Return whether there are files of weights (yet)."""
    return any((folder / name).is_file() for name in (SINGLE, INDEX))


def as_stored(folder: Path, config: ModelConfig) -> ModelConfig:
    """Return the config with the names and the layout that the files have, where the family knows several."""
    family = FAMILIES[config.family]
    prefixes, stacked = getattr(family, "PREFIXES", ()), getattr(family, "STACKED", {})
    if not prefixes and not stacked:
        return config
    there, embedding = headers(folder), family.TENSORS[EMBEDDING].removeprefix(_BASE_PREFIX)
    prefix = next((each for each in prefixes if each + embedding in there), config.prefix)
    config = replace(config, prefix=prefix)
    for layer, mlp in config.mixtures.items() if stacked else ():
        gate_up, down = (
            there.get(in_files(config, stacked[f"layers.expert_{name}.weight"]).format(layer=layer))
            for name in ("gate", "down")
        )
        if gate_up is not None and down is not None:
            D, F = mlp.hidden, mlp.width
            in_out = (gate_up.shape[1:], down.shape[1:]) == ((D, 2 * F), (F, D))
            return replace(config, stacked_experts=True, stacked_in_out=in_out)
    return config


def copied(folder: Path, config: ModelConfig) -> list[str]:
    """Return the tensors that belong to the model, but not to what is computed here (`families.COPIED`).

    A packed tensor is named once."""
    starts = getattr(FAMILIES[config.family], "COPIED", ())
    if not starts:
        return []
    dtypes = {name: stored.dtype for name, stored in headers(folder).items()}
    found = (name for name in unread(folder, config) if name.startswith(starts))
    return list(dict.fromkeys(packed.packed_name(dtypes, name) for name in found))


def has_another_head(folder: Path, config: ModelConfig) -> bool:
    """Return whether the files hold an embedding and a different head. False if there are no files (yet)."""
    if not has_weights(folder):
        return False
    tensors = MappedTensors(folder)
    embedding, head = tensors.find(config.prefix + EMBEDDING), tensors.find(in_files(config, HEAD))
    if embedding is None or head is None:
        return False
    return embedding.shape != head.shape or not _equal(embedding, head)


class ExpertViews:
    """The matrices of a layer's experts, which lie apart, as one [experts, in, out] array."""

    def __init__(self, views: list[Any]):
        self._views = views

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, tuple):
            return self._views[index]
        return np.stack([view[index[1:]] for view in self._views[index[0]]])


class MappedTensors:
    """The tensors of a folder's safetensors files as read-only views of mapped memory."""

    def __init__(self, folder: Path):
        self._maps: dict[Path, mmap.mmap] = {}
        self._views: dict[str, np.ndarray] = {}
        self._stored = headers(folder)
        for name, stored in self._stored.items():
            if stored.dtype in DTYPES:
                self._views[name] = self._view(stored)

    def _view(self, stored: Stored) -> np.ndarray:
        if stored.file not in self._maps:
            with stored.file.open("rb") as opened:
                self._maps[stored.file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        count = prod(stored.shape)
        dtype = (DTYPES | packed.DTYPES | _COPIED_DTYPES)[stored.dtype]
        view = np.frombuffer(self._maps[stored.file], dtype, count, offset=stored.begin)
        return view.reshape(stored.shape)

    def find(self, name: str) -> np.ndarray | None:
        return find(self._views, name)

    def unread(self, name: str) -> np.ndarray | None:
        """Return a tensor that no model computes with, such as a table of integers; None if its dtype is not
        known."""
        stored = self._stored[name]
        return self._view(stored) if stored.dtype in packed.DTYPES | _COPIED_DTYPES else None

    def whole(self, name: str) -> np.ndarray | MxFp4 | Packed | None:
        """Return a tensor, packed or not; None if the files do not have it."""
        if parts := packed_as(self._stored, name):
            dtypes = {each: self._stored[each].dtype for each in parts}
            try:
                return packed.unpacked(dtypes, name, lambda each: self._view(self._stored[each]))
            except ValueError as error:
                raise WeightsError(f"{name}: {error}") from None
        return self.find(name)

    def get(self, name: str, shape: tuple[int, ...]) -> np.ndarray | MxFp4 | Packed:
        """Return the view of tensor `name`. Raises WeightsError if it is missing or has another shape."""
        view = self.whole(name)
        if view is None:
            if (stored := find(self._stored, name)) is not None:
                raise WeightsError(f"{name} has dtype {stored.dtype} in the file; known: {', '.join(DTYPES)}")
            raise WeightsError(_missing(name, self._views))
        if view.shape != shape:
            raise WeightsError(_misshapen(name, view.shape, shape))
        return view

    def forget_pages(self) -> None:
        """Let the kernel drop pages that were read.

        It reads them from the file again when they are needed."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for mapped in self._maps.values():
                mapped.madvise(mmap.MADV_DONTNEED)

    def parameters(self, config: ModelConfig) -> dict[str, Parameter]:
        """Return `families.parameters` by path for these files: a tied model may be stored as its head
        alone."""
        found = {parameter.path: parameter for parameter in parameters(config)}
        embedding = found["embed_tokens.weight"].name
        head = in_files(config, HEAD)
        if config.tie_embeddings and self.find(embedding) is None and self.find(head) is not None:
            found["embed_tokens.weight"] = found["embed_tokens.weight"]._replace(name=head)
        return found

    def views(self, parameter: Parameter) -> list[Any]:
        """Return a parameter's tensors, one per layer, in our orientation. Raises as `get`."""
        tensors = (self.get(name, parameter.file_shape) for name, _ in parameter.tensors())
        views = [parameter.taken(tensor) for tensor in tensors]
        if not parameter.is_by_expert or (experts := parameter.experts) is None:
            return views
        return [ExpertViews(views[first : first + experts]) for first in range(0, len(views), experts)]


def _stored(file: Path, entry: dict[str, Any], data: int) -> Stored:
    begin, end = (int(offset) for offset in entry["data_offsets"])
    shape = tuple(int(size) for size in entry["shape"])
    if not 0 <= begin <= end or min(shape, default=0) < 0:
        raise ValueError(entry)
    return Stored(file, str(entry["dtype"]), shape, data + begin, data + end)


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    rows = max(1, _COMPARED_BYTES // max(1, a[:1].nbytes))
    return all(
        np.array_equal(a[at : at + rows].astype(np.float32), b[at : at + rows].astype(np.float32))
        for at in range(0, len(a), rows)
    )


def _present(folder: Path, name: str, named_by: str) -> Path:
    file = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise WeightsError(f"{name!r}, named by {named_by}, is not inside {folder}")
    if not file.is_file():
        raise WeightsError(f"{name} is named by {named_by}, but is not in {folder}")
    return file


def _missing(name: str, there: Mapping[str, Any]) -> str:
    some = ", ".join(list(there)[:3])
    hint = ""
    if name.endswith(HEAD):
        hint = " (config.json says that the head is not tied to the embedding)"
    elif some:
        hint = f" (they have {len(there)} others: {some}{', ...' if len(there) > 3 else ''})"
    return f"the weight files have no float tensor {name!r}{hint}"


def _misshapen(name: str, there: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    return f"{name} has shape {there} in the file; config.json means {wanted}"


def _why_no_weights(folder: Path) -> str:
    safetensors = sorted(file.name for file in folder.glob("*.safetensors"))
    if safetensors:
        return (
            f"{folder} has neither {SINGLE} nor {INDEX}; {safetensors[0]} alone does not say which files "
            "make up the model"
        )
    others = (
        f for kind in ("*.bin", "*.pt", "*.pth", "*.gguf", "*.msgpack", "*.h5") for f in _names(folder, kind)
    )
    if other := next(others, None):
        return (
            f"{folder} has no .safetensors files, and {other} is not read: convert the model with "
            "save_pretrained(folder) of transformers"
        )
    return f"{folder} has no .safetensors files"


def _names(folder: Path, pattern: str) -> Iterator[str]:
    return (file.name for file in sorted(folder.glob(pattern)) if file.name != "training_args.bin")
