"""The base models of a server: their names, folders, and what their config.json says to clients."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..engine import messages
from .storage.safetensors_header import Entry, entries

SMOLLM2 = "smollm2-135m"


@dataclass(frozen=True)
class BaseModel:
    name: str  # what clients call it
    folder: Path
    hub_id: str | None  # if it came from the Hugging Face hub
    max_sequence_length: int
    vocab_size: int

    @property
    def message(self) -> messages.BaseModel:
        return messages.BaseModel(self.name, str(self.folder))

    @cached_property
    def tensors(self) -> dict[str, Entry]:
        """Read at the first use. Raises OSError, ValueError."""
        return entries(self.folder)


def smollm2_folder(cache_dir: Path) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder; converted from its GGUF file the first time."""
    from ..ckpt.smollm2 import obtain

    return obtain(cache_dir, lambda text: print(text, file=sys.stderr))


def resolve(entry: str, cache_dir: Path, limit: int | None) -> BaseModel:
    """`PATH`, `HUB_ID`, `smollm2-135m`, or `NAME=` and one of them.

    `limit` caps the sequence length. Downloads a hub id. Raises ValueError saying what would be right.
    """
    name, separator, source = entry.partition("=")
    if not separator:
        name, source = "", entry
    path = Path(source).expanduser()
    hub_id = None
    if path.is_dir():
        folder = path.resolve()
        name = name or folder.name
    elif source == SMOLLM2:
        folder = smollm2_folder(cache_dir)
        name = name or SMOLLM2
    elif source.count("/") == 1 and not source.startswith((".", "/", "~")):
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
        try:
            folder = Path(snapshot_download(source, allow_patterns=patterns))
        except Exception as error:
            raise ValueError(f"model {source!r} could not be downloaded from the hub: {error}") from error
        hub_id, name = source, name or source
    else:
        raise ValueError(f"model {source!r} is neither a folder, nor a hub id (owner/name), nor {SMOLLM2!r}")
    return _described(name, folder, hub_id, limit)


def _described(name: str, folder: Path, hub_id: str | None, limit: int | None) -> BaseModel:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"model {name!r}: {folder} has no readable config.json: {error}") from error
    length = int(config.get("max_position_embeddings", 2048))
    return BaseModel(
        name=name,
        folder=folder,
        hub_id=hub_id,
        max_sequence_length=min(length, limit) if limit else length,
        vocab_size=int(config.get("vocab_size", 0)),
    )
