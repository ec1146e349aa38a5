"""Writes full weights as a Hugging Face folder, one file's tensors at a time.

This is the inverse of `model.load`: our stacked [L, in, out] parameters become one [out, in] tensor per layer
under the family's names. `transformers`, SGLang and `model.load` read the folder.

An adapter can be merged into the weights: W + scale x A B, computed in float32. An adapter of the unembedding
must not change the embedding. If the two are tied, the folder gets a separate `lm_head`, and its config says
so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np

from ..model.config import ModelConfig
from ..model.families import in_files, parameters
from ..model.lora import Adapter, pairs
from ..model.weight_files import MappedTensors, copied
from .fp8 import Fp8, quantized
from .hf_folder import SHARD_BYTES, Tensors, write_folder

Parameters = Callable[[str], Any]
"""Maps our dotted name of a parameter to its array, on a device or the host, or to one array per layer. Each
is released before the next one is requested."""


_HEAD = "lm_head.weight"


def in_memory(base: dict[str, Any]) -> Parameters:
    """Return the parameters of a base pytree of `model.decoder`."""

    def parameter(name: str) -> Any:
        at: Any = base
        for key in name.split("."):
            at = at[key]
        return at

    return parameter


def save_merged(
    directory: Path,
    values: Parameters,
    config: ModelConfig,
    *,
    base_folder: Path,
    adapter: Adapter | None = None,
    scale: float = 1.0,
    fp8: Fp8 | None = None,
    card: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write full weights in their own dtype, or the layers' matrices in float8.

    `base_folder` is the Hugging Face folder of the model from which training began. The product of an
    `adapter` (in host or device memory, rank padded or not), times `scale` (alpha / rank), is added. `card`
    is the text of a model card. Host memory holds the tensors of one file (up to `shard_bytes`) and one layer
    of a parameter at a time. The directory appears complete or not at all. Returns its size in bytes.
    """
    hf_config: dict[str, Any] = {"dtype": str(values("norm.weight").dtype)}
    if not config.tie_embeddings or (adapter is not None and "unembed" in adapter):
        hf_config["tie_word_embeddings"] = False  # whatever the base model's config.json says
    tensors: Tensors = chain(
        _tensors(values, config, adapter, scale),
        _copied(Path(base_folder), config, values("norm.weight").dtype),
    )
    if fp8 is not None:
        tensors = quantized(tensors, fp8, config)
        hf_config["quantization_config"] = fp8.config(config)
    return write_folder(
        directory, tensors, base_folder=base_folder, config=hf_config, card=card, shard_bytes=shard_bytes
    )


@dataclass(frozen=True)
class _Delta:
    """The product to add to a matrix: {"a": [in, R], "b": [R, out]}, stacked over layers and experts as in
    `model.lora`."""

    pair: dict[str, Any]
    scale: float
    shared: str | None = None  # the factor that has no axis for experts

    def added(self, weight: np.ndarray, index: tuple[int, ...]) -> np.ndarray:
        """Return the [..., in, out] weight with the product added."""
        a, b = (
            _part(self.pair[side], index[:1] if side == self.shared else index).astype(np.float32)
            for side in "ab"
        )
        return (weight.astype(np.float32) + self.scale * (a @ b)).astype(weight.dtype)


def _tensors(
    values: Parameters, config: ModelConfig, adapter: Adapter | None, scale: float
) -> Iterator[tuple[str, np.ndarray]]:
    deltas: dict[str, _Delta] = {}
    if adapter is not None:
        deltas = {
            stack.path(f"{site.name}.weight"): _Delta(pair, scale, site.shared)
            for stack, site, pair in pairs(adapter, config)
        }
        if "unembed" in adapter:
            deltas[_HEAD] = _Delta(adapter["unembed"], scale)
    for _, together in groupby(parameters(config), lambda each: (each.name, each.layers)):
        sharing = list(together)  # one parameter, or several in the same tensors
        held = [values(parameter.path) for parameter in sharing]
        for name, index in sharing[0].tensors():
            ours = []
            for parameter, value in zip(sharing, held, strict=True):
                array, delta = _part(value, index), deltas.get(parameter.path)
                ours.append(array if delta is None else delta.added(array, index))
            whole = ours[0]
            if len(sharing) > 1:
                whole = np.empty((*whole.shape[:-1], sharing[0].whole), whole.dtype)
                for parameter, array in zip(sharing, ours, strict=True):
                    parameter.place(whole)[...] = array
            whole = whole.swapaxes(-1, -2) if sharing[0].transposed else whole
            yield name, np.ascontiguousarray(whole)
        del held
    if config.tie_embeddings and _HEAD in deltas:
        head = np.asarray(values("embed_tokens.weight"))
        yield in_files(config, _HEAD), np.ascontiguousarray(deltas[_HEAD].added(head.T, ()).T)


def _copied(folder: Path, config: ModelConfig, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors of the base model that are not computed with, as they are; packed ones in `dtype`."""
    if names := copied(folder, config):
        tensors = MappedTensors(folder)
        for name in names:
            tensor = tensors.whole(name)
            tensor = tensors.unread(name) if tensor is None else tensor
            if isinstance(tensor, np.ndarray):
                yield name, np.ascontiguousarray(tensor)
            elif tensor is not None:
                yield name, np.ascontiguousarray(tensor, dtype)


def _part(value: Any, index: tuple[int, ...]) -> np.ndarray:
    for at in index:
        value = value[at]
    return np.asarray(value)
