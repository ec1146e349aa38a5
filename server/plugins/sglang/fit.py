"""Whether full weights are what an SGLang server was started with: a tensor of another shape ends it, one in
another format is read as what it is not."""

from __future__ import annotations

from pathlib import Path

from ...safetensors_header import Entry, entries
from .endpoints import Registered
from .exports import Export
from .folders import Folders

_HEAD = "lm_head.weight"


def misfit(export: Export, endpoint: Registered, base: dict[str, Entry], folders: Folders) -> str | None:
    """Why the server must not be sent it; `base` are the base model's tensors. Raises OSError, ValueError."""
    if endpoint.limits is None or not endpoint.reachable:
        return f"it cannot be reached: {endpoint.problem}"
    quantization = endpoint.limits.quantization
    if quantization not in (None, "fp8"):
        return f"it computes in {quantization}; weights go out as they are, or in fp8"
    if export.is_quantized != (quantization == "fp8"):
        is_in = "fp8" if quantization else endpoint.limits.dtype or "its model's dtype"
        return f"it was started in {is_in}: set_sync_quantization, or the server, has to be the other way"
    if quantization is None:
        return _differ(export.tensors, base)
    theirs = Path(endpoint.limits.model_path)
    key = folders.key_of(endpoint.limits.model_path)
    if key is not None:
        theirs = folders.here(key)
    elif endpoint.owner is not None or not theirs.is_dir():
        return (
            "which of its matrices are in fp8, and in which blocks, cannot be seen from here: its model's "
            "folder has to be on a volume that both have, and the server be one of --sglang"
        )
    return _differ(export.tensors, entries(theirs))


def _differ(ours: dict[str, Entry], theirs: dict[str, Entry]) -> str | None:
    for name, entry in ours.items():
        if name not in theirs:
            if name == _HEAD:
                return (
                    "the adapter has trained the unembedding, which the server shares with the embedding: "
                    "sample it as an adapter (LoRA), or train without it (train_unembed=False)"
                )
            return f"it has no {name}"
        if entry.shape != theirs[name].shape:
            return f"{name} has shape {entry.shape}; there it is {theirs[name].shape}"
        if _is_fp8(entry) != _is_fp8(theirs[name]):
            return f"{name} is {entry.dtype}; there it is {theirs[name].dtype}"
    missing = [name for name in theirs.keys() - ours.keys() if name != _HEAD and "inv_freq" not in name]
    return f"{min(missing)} is not among the weights, and would stay as it is" if missing else None


def _is_fp8(entry: Entry) -> bool:
    return entry.dtype.startswith("F8")
