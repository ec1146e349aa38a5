"""Full weights as a Hugging Face folder: config.json, sharded safetensors, the tokenizer's files.

The inverse of `model.load`: our stacked [L, in, out] parameters become one [out, in] tensor per layer under
the family's names. `transformers` and `model.load` both read the folder.

An adapter can be merged into them: W + scale x A B, computed in float32. One of the unembedding unties it
from the embedding, which it must not change: the folder then has an `lm_head` of its own, and its config says
so.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ..model.config import ModelConfig
from ..model.families import FAMILIES, is_transposed, tensor_names
from ..model.lora import Adapter
from . import digests
from .atomic import atomic_directory, size_bytes

COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
"""Files of the base model's folder that go along, where it has them."""


def save_merged(
    directory: Path,
    base: dict[str, Any],
    config: ModelConfig,
    *,
    base_folder: Path,
    adapter: Adapter | None = None,
    scale: float = 1.0,
    shard_bytes: int = 4 << 30,
) -> int:
    """Write full weights (`model.decoder`'s base pytree, in host or device memory), in their own dtype.

    `base_folder` is the Hugging Face folder of the model that they began as. With an `adapter` (in host or
    device memory, rank padded or not) its product, times `scale` (alpha / rank), is added. Files hold up to
    `shard_bytes` each, and one of them is in memory at a time. The directory appears whole; returns its size
    in bytes.
    """
    tensors = _tensors(base, config, adapter, scale)
    untied = {"tie_word_embeddings": False} if adapter is not None and "unembed" in adapter else {}
    files = _shards(tensors, shard_bytes)
    with atomic_directory(directory) as writing:
        weight_map: dict[str, str] = {}
        for index, names in enumerate(files):
            file = (
                f"model-{index + 1:05d}-of-{len(files):05d}.safetensors" if files[1:] else "model.safetensors"
            )
            save_file({name: tensors[name].array() for name in names}, writing / file, {"format": "pt"})
            weight_map |= dict.fromkeys(names, file)
        if len(files) > 1:
            total_size = sum(tensor.nbytes for tensor in tensors.values())
            _write_json(
                writing / "model.safetensors.index.json",
                {"metadata": {"total_size": total_size}, "weight_map": weight_map},
            )
        hf_config = json.loads((Path(base_folder) / "config.json").read_text())
        hf_config.pop("torch_dtype", None)
        dtype = {"dtype": str(base["norm"]["weight"].dtype)}
        _write_json(writing / "config.json", hf_config | dtype | untied)
        for name in COPIED:
            if (Path(base_folder) / name).is_file():
                shutil.copyfile(Path(base_folder) / name, writing / name)
        size = size_bytes(writing)
        digests.write(writing)
    return size


@dataclass(frozen=True)
class _Tensor:
    """One Hugging Face tensor as a view of one of our parameters, and what is added to it."""

    parameter: Any
    layer: int | None
    transposed: bool
    lora: dict[str, Any] | None = None  # {"a": [in, R], "b": [R, out]}, with a first axis L where layers have
    scale: float = 1.0

    @property
    def nbytes(self) -> int:
        return self.parameter.nbytes // (1 if self.layer is None else self.parameter.shape[0])

    def array(self) -> np.ndarray:
        array = self._of_layer(self.parameter)
        array = array.T if self.transposed else array
        if self.lora is not None:
            a_IR, b_RO = (self._of_layer(self.lora[side]).astype(np.float32) for side in "ab")
            array = (array.astype(np.float32) + self.scale * (a_IR @ b_RO).T).astype(array.dtype)
        return np.ascontiguousarray(array)

    def _of_layer(self, parameter: Any) -> np.ndarray:
        return np.asarray(parameter if self.layer is None else parameter[self.layer])


def _tensors(
    base: dict[str, Any], config: ModelConfig, adapter: Adapter | None, scale: float
) -> dict[str, _Tensor]:
    """By Hugging Face name, in the order of the layers."""
    pairs = {}
    if adapter is not None:
        pairs = {f"layers.{name}.weight": pair for name, pair in adapter["layers"].items()}
        if "unembed" in adapter:
            pairs["lm_head.weight"] = adapter["unembed"]
    tensors = {}
    for ours, theirs in tensor_names(config).items():
        parameter = base
        for key in ours.split("."):
            parameter = parameter[key]
        layers = range(config.num_layers) if "{layer}" in theirs else (None,)
        for layer in layers:
            name = theirs.format(layer=layer)
            tensors[name] = _Tensor(parameter, layer, is_transposed(ours), pairs.get(ours), scale)
    if config.tie_embeddings and "lm_head.weight" in pairs:
        tensors[FAMILIES[config.family].TENSORS["lm_head.weight"]] = _Tensor(
            base["embed_tokens"]["weight"], None, False, pairs["lm_head.weight"], scale
        )
    return tensors


def _shards(tensors: dict[str, _Tensor], shard_bytes: int) -> list[list[str]]:
    """The tensors' names cut into files, in order; a tensor above `shard_bytes` has a file of its own."""
    files: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if files[-1] and filled + tensor.nbytes > shard_bytes:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += tensor.nbytes
    return files


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
