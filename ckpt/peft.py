"""Adapters as PEFT writes them: `adapter_model.safetensors` and `adapter_config.json`.

`save_adapter` writes what `peft.PeftModel.from_pretrained` loads, with the true rank (the padding that the
trainer's rank buckets add is cut off) and every target module named. `load_adapter` reads it back, and reads
adapters that PEFT itself has written.

The adapter of the unembedding is PEFT's LoRA on `lm_head`. It is a bypass beside the matrix, so it is right
for models with tied embeddings too as long as it stays an adapter; merging it into such a model
(`merge_and_unload`) would change the input embedding as well, unless the two are untied first.

Axes: L layers, R rank.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ..model.config import ModelConfig
from ..model.families import FAMILIES
from ..model.lora import RANK_BUCKETS, Adapter, pad_rank
from . import digests
from .atomic import atomic_directory, size_bytes
from .hf_folder import READ_AS_ONE

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"

# Features of PEFT that change the function which the matrices A and B stand for.
_UNSUPPORTED = (
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "fan_in_fan_out",
    "trainable_token_indices",
)
_DTYPES = frozenset({"float64", "float32", "float16", "bfloat16"})
_MAX_CONFIG_BYTES = 1 << 20
_MAX_ALPHA = 1e6


class AdapterError(ValueError):
    """The directory holds an adapter that the model cannot use; the message says why."""


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter read from disk, in host memory: {"layers": {name: {"a": [L, in, R], "b": [L, R, out]}},
    "unembed": {"a": [D, R], "b": [R, V]}}, with padded columns of zeros. Its scale is alpha / rank."""

    adapter: Adapter
    rank: int
    alpha: float
    base_model: str


def save_adapter(
    directory: Path, adapter: Adapter, config: ModelConfig, *, rank: int, alpha: float, base_model: str
) -> int:
    """Write an adapter (arrays in host or device memory, rank padded or not); the directory appears whole.

    Serving engines need q, k and v together, and gate and up: one that has no adapter where another of them
    has gets one of zeros. Its scale is lora_alpha / r, and nothing else in the config changes it. Returns the
    size in bytes.
    """
    adapter = _whole(adapter, config)
    tensors: dict[str, np.ndarray] = {}
    for module, layer, name in _modules(adapter, config):
        pair = adapter["unembed"] if name == "unembed" else adapter["layers"][name]
        a_IR, b_RO = (np.asarray(pair[side] if layer is None else pair[side][layer]) for side in "ab")
        tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(a_IR[:, :rank].T)
        tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(b_RO[:rank].T)
    targets = {module.rsplit(".", 1)[-1] for module, _, _ in _modules(adapter, config)}
    adapter_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    with atomic_directory(directory) as writing:
        save_file(tensors, writing / ADAPTER_FILE, metadata={"format": "pt"})
        (writing / CONFIG_FILE).write_text(json.dumps(adapter_config, indent=2) + "\n")
        size = size_bytes(writing)
        digests.write(writing)
    return size


def _whole(adapter: Adapter, config: ModelConfig) -> Adapter:
    """With zeros for what is left out of the matrices that are read as one."""
    layers = dict(adapter["layers"])
    for group in READ_AS_ONE:
        given = next((layers[name] for name in group if name in layers), None)
        if given is None:
            continue
        padded_rank = given["a"].shape[-1]
        for name in group:
            into, out = config.linears[name]
            shapes = {"a": (config.num_layers, into, padded_rank), "b": (config.num_layers, padded_rank, out)}
            layers.setdefault(name, {side: np.zeros(shape, np.float32) for side, shape in shapes.items()})
    return adapter | {"layers": layers}


def is_adapter(directory: Path) -> bool:
    return (Path(directory) / CONFIG_FILE).is_file() and (Path(directory) / ADAPTER_FILE).is_file()


def load_adapter(directory: Path, config: ModelConfig) -> SavedAdapter:
    """Read an adapter into host memory, its rank padded with zeros to its bucket (`lora.pad_rank`).

    A layer that a module's adapter leaves out gets zeros. Raises FileNotFoundError where there is no adapter;
    AdapterError if it is not one for this model, or uses what a plain LoRA has not (DoRA, a rank per module,
    biases, modules saved whole).
    """
    directory = Path(directory)
    if not is_adapter(directory):
        raise FileNotFoundError(f"no PEFT adapter in {directory.name}")
    adapter_config = _read_config(directory)
    refused = [key for key in _UNSUPPORTED if adapter_config.get(key)]
    if adapter_config.get("bias", "none") != "none":
        refused.append("bias")
    if refused:
        raise AdapterError(
            f"PEFT adapter {directory.name} uses {', '.join(refused)}; only plain LoRA is supported"
        )
    rank = adapter_config["r"]
    padded_rank = pad_rank(rank)
    alpha = float(adapter_config["lora_alpha"]) * (
        math.sqrt(rank) if adapter_config.get("use_rslora") else 1.0
    )

    linears = {**config.linears, "unembed": (config.hidden_size, config.vocab_size)}
    tensors = _read_tensors(directory)
    adapter: Adapter = {"layers": {}}
    for module, layer, name in _modules(None, config):
        into, out = linears[name]
        for side, shape in (("a", (into, rank)), ("b", (rank, out))):
            tensor = tensors.pop(f"{module}.lora_{side.upper()}.weight", None)
            if tensor is None:
                continue
            if tensor.T.shape != shape:
                raise AdapterError(
                    f"PEFT adapter {directory.name}: {module}.lora_{side.upper()} has shape {tensor.shape}; "
                    f"expected {shape[::-1]}"
                )
            padded = (into, padded_rank) if side == "a" else (padded_rank, out)
            pair = adapter["layers"] if layer is not None else adapter
            stored = pair.setdefault(name, {}).setdefault(
                side, np.zeros(padded if layer is None else (config.num_layers, *padded), np.float32)
            )
            (stored if layer is None else stored[layer])[: shape[0], : shape[1]] = tensor.T
    # PEFT adds a copy of an unembedding that has an adapter. It is the base's, which LoRA leaves as it is.
    for module, _, name in _modules(None, config)[-1:]:
        copied = tensors.pop(f"{module}.base_layer.weight", None)
        if copied is not None and copied.shape != linears[name][::-1]:
            raise AdapterError(
                f"PEFT adapter {directory.name}: {module} has shape {copied.shape}; "
                f"the model's is {linears[name][::-1]}"
            )
    if tensors:
        raise AdapterError(f"PEFT adapter {directory.name}: the model has no place for {min(tensors)}")
    for name, pair in (*adapter["layers"].items(), ("unembed", adapter.get("unembed"))):
        if pair is not None and len(pair) != 2:
            raise AdapterError(f"PEFT adapter {directory.name}: {name} has one of lora_A and lora_B alone")
    return SavedAdapter(adapter, rank, alpha, adapter_config.get("base_model_name_or_path") or "")


def _read_config(directory: Path) -> dict[str, Any]:
    """The adapter's config with a rank that we have, a finite alpha, and the base model's name or None."""
    try:
        with (directory / CONFIG_FILE).open("rb") as file:
            read = json.loads(file.read(_MAX_CONFIG_BYTES))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"PEFT adapter {directory.name}: {CONFIG_FILE} is not JSON: {error}") from None
    if not isinstance(read, dict):
        raise AdapterError(f"PEFT adapter {directory.name}: {CONFIG_FILE} is not an object")
    rank, base = read.get("r"), read.get("base_model_name_or_path")
    alpha: Any = read.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= RANK_BUCKETS[-1]:
        raise AdapterError(f"PEFT adapter {directory.name}: r is not a rank of 1 to {RANK_BUCKETS[-1]}")
    is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not is_number or not -_MAX_ALPHA <= alpha <= _MAX_ALPHA:
        raise AdapterError(f"PEFT adapter {directory.name}: lora_alpha is not a number up to {_MAX_ALPHA:g}")
    if base is not None and not isinstance(base, str):
        raise AdapterError(f"PEFT adapter {directory.name}: base_model_name_or_path is not a text")
    return read


def _read_tensors(directory: Path) -> dict[str, np.ndarray]:
    try:
        tensors = load_file(directory / ADAPTER_FILE)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise AdapterError(
            f"PEFT adapter {directory.name}: {ADAPTER_FILE} is not safetensors: {error}"
        ) from None
    for name, tensor in tensors.items():
        if tensor.dtype.name not in _DTYPES:
            raise AdapterError(f"PEFT adapter {directory.name}: {name} is {tensor.dtype.name}, not a float")
    return tensors


def _modules(adapter: Adapter | None, config: ModelConfig) -> list[tuple[str, int | None, str]]:
    """(PEFT's name of a module, its layer or None, our name) of what an adapter holds, or (None) may hold."""
    names = FAMILIES[config.family].TENSORS
    modules: list[tuple[str, int | None, str]] = []
    for name in config.linears if adapter is None else adapter["layers"]:
        pattern = "base_model.model." + names[f"layers.{name}.weight"].removesuffix(".weight")
        modules += [(pattern.format(layer=layer), layer, name) for layer in range(config.num_layers)]
    if adapter is None or "unembed" in adapter:
        modules.append(
            ("base_model.model." + names["lm_head.weight"].removesuffix(".weight"), None, "unembed")
        )
    return modules
