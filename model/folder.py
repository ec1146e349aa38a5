"""Reads a model folder: its config, the headers of its weight files and the digest that identifies the model.

Imports no array library, because the server process uses this module before an engine starts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

from . import packed
from .config import Attention, GatedMlp, ModelConfig, UnsupportedModelError, read_json
from .counts import Counts, counts
from .families import FAMILIES, adapter_modules, in_files, merged_modules, parameter_count, tensor_shapes
from .weight_files import (
    EMBEDDING,
    HEAD,
    INDEX,
    SINGLE,
    Stored,
    WeightsError,
    as_stored,
    check,
    find,
    has_another_head,
    has_weights,
    headers,
    packed_as,
)

__all__ = [
    "INDEX",
    "SINGLE",
    "Counts",
    "ModelConfig",
    "adapter_modules",
    "check",
    "counts",
    "digest",
    "head_name",
    "headers",
    "merged_modules",
    "parameter_count",
    "read_config",
    "stated_config",
    "tensor_shapes",
]

_DIGEST_VERSION = 1
_BLOCK_BYTES = 1 << 20
_HASHED_BYTES = 512 << 20
_NOT_ARITHMETIC = ("max_sequence_length", "eos_token_ids", "prefix", "stacked_experts", "stacked_in_out")
_FIRST_FAMILIES = ("llama", "qwen2", "qwen3")


def read_config(folder: Path) -> ModelConfig:
    """Read a model's config, and check its weight files where config.json alone cannot be trusted.

    As in transformers, a model that config.json calls tied is not tied if its files hold a different head.
    Raises UnsupportedModelError as `stated_config` does, and WeightsError for files that are not safetensors.
    """
    config = stated_config(folder)
    if has_weights(Path(folder)):
        config = as_stored(Path(folder), config)
    if config.tie_embeddings and has_another_head(Path(folder), config):
        return dataclasses.replace(config, tie_embeddings=False)
    return config


def stated_config(folder: Path) -> ModelConfig:
    """Read config.json, and the end-of-sequence tokens of generation_config.json if it has any.

    Raises UnsupportedModelError for a missing or damaged file, an unknown family or an unsupported option.
    """
    folder = Path(folder)
    hf = read_json(folder / "config.json")
    if hf is None:
        raise UnsupportedModelError(_why_no_config(folder))
    model_type = hf.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise UnsupportedModelError(
            f"{folder}: model_type {model_type!r} is not supported; known: {', '.join(FAMILIES)}"
        )
    if (folder / "adapter_config.json").is_file():
        # transformers would load the adapter's base model, and the adapter on top of it
        raise UnsupportedModelError(
            f"{folder} has an adapter_config.json beside its config.json: is it a model or an adapter? Serve "
            "the model from a folder without adapter files"
        )
    for stated in (hf, hf.get("text_config")):
        if isinstance(stated, dict):
            _refuse_quantized(folder, stated, getattr(family, "QUANTIZED", ()))
    generation = read_json(folder / "generation_config.json") or {}
    if generation.get("eos_token_id") is not None:
        hf = hf | {"eos_token_id": generation["eos_token_id"]}
    try:
        return family.read(hf)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{folder}/config.json: {error}") from None


def head_name(config: ModelConfig) -> str:
    """Return the name that the unembedding has in the model's files, if it is not tied to the embedding."""
    return in_files(config, HEAD)


def digest(folder: Path, config: ModelConfig) -> str:
    """Return a hash of the model's arithmetic (`config`) and weights, which identifies the model.

    It does not depend on the folder's location, on how tensors are spread over files, or on other content of
    the files. Beyond 512 MB of weights, only every n-th MB and the end of every tensor are hashed, because
    training changes all weights. Raises WeightsError or OSError.
    """
    hashed = hashlib.blake2b(digest_size=16)
    hashed.update(_arithmetic(config).encode())
    stored = headers(folder)
    tensors = {}
    for name in sorted(tensor_shapes(config)):
        tensors |= {each: stored[each] for each in packed_as(stored, name)} or {
            name: _stored(stored, name, head_name(config))
        }
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


def _stored(stored: dict[str, Stored], name: str, head: str) -> Stored:
    found = find(stored, name)
    if found is None and name.endswith(EMBEDDING):
        found = stored.get(head)
    if found is None:
        raise WeightsError(f"the weight files have no float tensor {name!r}")
    return found


def _arithmetic(config: ModelConfig) -> str:
    """Return the fields that differ from their defaults, so that fields added later change no digest.

    The first families keep the form of their first digests, by which existing models know their base."""
    if config.family not in _FIRST_FAMILIES:
        return repr(_stated(config))
    layers = config.layers
    mixer, mlp = layers[0].mixer, layers[0].mlp
    assert isinstance(mixer, Attention)
    assert isinstance(mlp, GatedMlp)
    windows = [layer.mixer.window for layer in layers if isinstance(layer.mixer, Attention)]
    fields = _stated(config) | {
        "intermediate_size": mlp.width,
        "num_layers": len(layers),
        "num_heads": mixer.heads,
        "num_kv_heads": mixer.kv_heads,
        "head_dim": mixer.head_dim,
        "rope_theta": mixer.rope.theta,
        "biased": mixer.biased + mlp.biased or None,
        "qk_norm": mixer.qk_norm or None,
        "sliding_window": max((window for window in windows if window), default=None),
        "windowed_layers": tuple(map(bool, windows)) if any(windows) and not all(windows) else None,
    }
    scaling = {} if mixer.rope.scaling is None else _stated(mixer.rope.scaling)
    fields |= {f"rope_scaling.{name}": value for name, value in scaling.items()}
    del fields["groups"]
    return repr(sorted((name, value) for name, value in fields.items() if value is not None))


def _stated(described: Any) -> Any:
    """Return a description as plain values, without the fields that have their defaults."""
    if isinstance(described, tuple):
        return tuple(map(_stated, described))
    if not dataclasses.is_dataclass(described):
        return described
    return {
        field.name: _stated(getattr(described, field.name))
        for field in dataclasses.fields(described)
        if field.name not in _NOT_ARITHMETIC and getattr(described, field.name) != field.default
    }


def _refuse_quantized(folder: Path, hf: dict[str, Any], known: tuple[str, ...]) -> None:
    for key in ("quantization_config", "compression_config", "quantization"):
        if stated := hf.get(key):
            method = stated.get("quant_method") if isinstance(stated, dict) else stated
            if method in known and isinstance(stated, dict):
                try:
                    packed.refuse_unread(stated)
                except UnsupportedModelError as error:
                    raise UnsupportedModelError(f"{folder}/config.json: {error}") from None
                continue
            raise UnsupportedModelError(
                f"{folder}: its weights are quantized ({key}: {method or 'of an unnamed method'}), which is "
                "not supported; give the unquantized model (float32, float16 or bfloat16)"
            )


def _why_no_config(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        base = (read_json(folder / "adapter_config.json") or {}).get("base_model_name_or_path")
        return (
            f"{folder} is a PEFT adapter{f' of {base}' if base else ''}, not a model: serve its base model, "
            "and import the adapter with tinsmith checkpoints import"
        )
    if any(folder.glob("*.gguf")):
        return (
            f"{folder} has GGUF files and no config.json: GGUF models are not supported; give the model's "
            "Hugging Face folder"
        )
    return f"{folder} has no config.json: not a Hugging Face model folder"
