"""Reads and writes adapters in PEFT's format: `adapter_model.safetensors` and `adapter_config.json`.

`save_adapter` writes what `peft.PeftModel.from_pretrained` loads, with the true rank (the padding of the
trainer's rank buckets is cut off) and with all target modules listed. `load_adapter` reads it back, and also
reads adapters written by PEFT.

The adapter of the unembedding is PEFT's LoRA on `lm_head`. It bypasses the matrix, so as an adapter it is
correct for models with tied embeddings too. Merging it into such a model (`merge_and_unload`) would also
change the input embedding, unless the two are untied first.

Axes: L layers, R rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ..model.config import ModelConfig
from ..model.families import FAMILIES, is_transposed
from ..model.lora import RANK_BUCKETS, Adapter, pad_rank
from . import digests, peft_config
from .atomic import atomic_directory, size_bytes
from .hf_folder import READ_AS_ONE, copy_tokenizer
from .peft_config import AdapterConfig, AdapterError

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_PREFIX = "base_model.model."  # PEFT's prefix to the names of the base model's modules

_DTYPES = frozenset({"float64", "float32", "float16", "bfloat16"})

Unchanged = Callable[[str], np.ndarray]
"""Maps our dotted name of a parameter of the base model to its array."""


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter read from disk, in host memory, with its rank padded with zeros.

    {"layers": {name: {"a": [L, in, R], "b": [L, R, out]}}, "unembed": {"a": [D, R], "b": [R, V]}}. Its scale
    is alpha / rank."""

    adapter: Adapter
    rank: int
    alpha: float
    base_model: str


def save_adapter(
    directory: Path,
    adapter: Adapter,
    config: ModelConfig,
    *,
    rank: int,
    alpha: float,
    base_model: str,
    tokenizer_of: Path | None = None,
) -> int:
    """Write an adapter (in host or device memory, rank padded or not). The directory appears complete or not
    at all.

    Serving engines need adapters for q, k and v together, and for gate and up together. If only some of them
    have one, the others get one of zeros. The scale is lora_alpha / r, and nothing else in the config changes
    it.

    `base_model` is where PEFT's readers load the base model from: a folder, or a hub id that may end with
    `@revision`. The tokenizer files of the folder `tokenizer_of` are copied, because
    `AutoPeftModelForCausalLM` looks for them here. Returns the size in bytes.
    """
    adapter = _whole(adapter, config)
    tensors: dict[str, np.ndarray] = {}
    for module, layer, name in _modules(adapter, config):
        pair = adapter["unembed"] if name == "unembed" else adapter["layers"][name]
        a_IR, b_RO = (np.asarray(pair[side] if layer is None else pair[side][layer]) for side in "ab")
        tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(a_IR[:, :rank].T)
        tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(b_RO[:rank].T)
    targets = {module.rsplit(".", 1)[-1] for module, _, _ in _modules(adapter, config)}
    # A folder may have an @ in its name; a hub id has none.
    is_folder = Path(base_model).is_absolute()
    name, _, revision = (base_model, "", "") if is_folder else base_model.partition("@")
    adapter_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "revision": revision or None,
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
        if tokenizer_of is not None:
            copy_tokenizer(tokenizer_of, writing)
        size = size_bytes(writing)
        digests.write(writing)
    return size


def _whole(adapter: Adapter, config: ModelConfig) -> Adapter:
    """Add adapters of zeros where only some of the matrices that engines merge into one have an adapter."""
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


def load_adapter(directory: Path, config: ModelConfig, base: Unchanged | None = None) -> SavedAdapter:
    """Read an adapter into host memory, its rank padded with zeros to its bucket (`lora.pad_rank`).

    A layer without an adapter for a module gets zeros. Modules may have different ranks and scales
    (`rank_pattern`, `alpha_pattern`): a smaller rank is padded with zeros, and a different scale is
    multiplied into B. `base` is needed for a file with copies of the base model's embedding or unembedding,
    which PEFT sometimes adds; they must equal those of the base model.

    Raises FileNotFoundError if there is no adapter, and AdapterError if it is not for this model or is more
    than a plain LoRA (`peft_config`).
    """
    directory = Path(directory)
    if not is_adapter(directory):
        raise FileNotFoundError(f"no PEFT adapter in {directory.name}")
    where = f"PEFT adapter {directory.name}"
    adapter_config = _read_config(directory)
    tensors = _read_tensors(directory)
    a_shapes = [tensor.shape for name, tensor in tensors.items() if name.endswith(".lora_A.weight")]
    rank, alpha = adapter_config.overall(shape[0] for shape in a_shapes if shape)
    if not 1 <= rank <= RANK_BUCKETS[-1]:
        raise AdapterError(f"{where}: a lora_A has rank {rank}; it must be from 1 to {RANK_BUCKETS[-1]}")
    padded_rank = pad_rank(rank)

    linears = {**config.linears, "unembed": (config.hidden_size, config.vocab_size)}
    adapter: Adapter = {"layers": {}}
    for module, layer, name in _modules(None, config):
        into, out = linears[name]
        of_base = module.removeprefix(_PREFIX)
        true_rank = adapter_config.rank_of(of_base)
        factor = np.float32(adapter_config.scale_of(of_base) / (alpha / rank))
        for side, shape in (("a", (into, true_rank)), ("b", (true_rank, out))):
            tensor = tensors.pop(f"{module}.lora_{side.upper()}.weight", None)
            if tensor is None:
                continue
            if (field := adapter_config.leaves_out(of_base)) is not None:
                raise AdapterError(
                    f"{where}: {field} leaves out {of_base}, for which there are tensors; PEFT would not "
                    "load them"
                )
            if tensor.T.shape != shape:
                raise AdapterError(
                    f"{where}: {module}.lora_{side.upper()} has shape {tensor.shape}; expected {shape[::-1]}"
                )
            padded = (into, padded_rank) if side == "a" else (padded_rank, out)
            pair = adapter["layers"] if layer is not None else adapter
            stored = pair.setdefault(name, {}).setdefault(
                side, np.zeros(padded if layer is None else (config.num_layers, *padded), np.float32)
            )
            at = (stored if layer is None else stored[layer])[: shape[0], : shape[1]]
            at[:] = tensor.T if side == "a" or factor == 1 else tensor.T.astype(np.float32) * factor
    _take_copies(tensors, config, base, where)
    if tensors:
        raise AdapterError(f"{where}: the model has no place for {min(tensors)}")
    for name, pair in (*adapter["layers"].items(), ("unembed", adapter.get("unembed"))):
        if pair is not None and len(pair) != 2:
            raise AdapterError(f"{where}: {name} has only one of lora_A and lora_B")
    return SavedAdapter(adapter, rank, alpha, adapter_config.base_model)


def _take_copies(
    tensors: dict[str, np.ndarray], config: ModelConfig, base: Unchanged | None, where: str
) -> None:
    """Remove PEFT's copies of base weights: of an unembedding with an adapter, and of embeddings saved on
    request.

    PEFT loads them over the base model's, so they must be equal. Raises AdapterError if they are not."""
    names = FAMILIES[config.family].TENSORS
    unembedding = "embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"
    shape = (config.vocab_size, config.hidden_size)
    for ours, parameter in (("embed_tokens.weight", "embed_tokens.weight"), ("lm_head.weight", unembedding)):
        module = _PREFIX + names[ours].removesuffix(".weight")
        for name in (f"{module}.weight", f"{module}.base_layer.weight"):
            copied = tensors.pop(name, None)
            if copied is None:
                continue
            if copied.shape != shape:
                raise AdapterError(f"{where}: {name} has shape {copied.shape}; the model's is {shape}")
            own = None if base is None else np.asarray(base(parameter))
            own = own.T if own is not None and is_transposed(parameter) else own
            # Compared in the copy's precision, because it may have been rounded when it was saved.
            if own is None or not np.array_equal(own.astype(copied.dtype), copied):
                raise AdapterError(
                    f"{where}: {name} is not the base model's; weights trained beside an adapter are refused"
                )


def _read_config(directory: Path) -> AdapterConfig:
    with (directory / CONFIG_FILE).open("rb") as file:
        content = file.read(peft_config.MAX_BYTES)
    return peft_config.read(content, f"PEFT adapter {directory.name}: {CONFIG_FILE}")


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
    """List (PEFT's name, layer or None, our name) of an adapter's modules; for None, of all possible ones."""
    names = FAMILIES[config.family].TENSORS
    modules: list[tuple[str, int | None, str]] = []
    for name in config.linears if adapter is None else adapter["layers"]:
        pattern = _PREFIX + names[f"layers.{name}.weight"].removesuffix(".weight")
        modules += [(pattern.format(layer=layer), layer, name) for layer in range(config.num_layers)]
    if adapter is None or "unembed" in adapter:
        modules.append((_PREFIX + names["lm_head.weight"].removesuffix(".weight"), None, "unembed"))
    return modules
