"""Full weights in folders that SGLang servers load: made by the engine, once of each version and format."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from math import prod
from weakref import WeakValueDictionary

import msgspec

from ....ckpt import paths
from ....engine import messages
from ...base_models import BaseModel
from ...errors import BadRequest, Unavailable
from ...files import Disk, Entry, tensor_entries
from ...supervision.supervisor import Supervisor
from .adapters import EXPORTS, Folders, is_adapter

_RECORD = ".json"  # beside a folder: what is in it


@dataclass(frozen=True)
class Export:
    """`key` of the folder; `weights` is the key of what it was made of, None: the base model itself."""

    key: str
    base_model: str
    weights: str | None
    tensors: dict[str, Entry]
    bytes: int
    files: int

    @property
    def is_quantized(self) -> bool:
        return any(entry.dtype.startswith("F8") for entry in self.tensors.values())

    @property
    def parameters(self) -> int:
        """Without the scales of quantized ones."""
        return sum(prod(entry.shape) for name, entry in self.tensors.items() if "_scale" not in name)


class Exports:
    def __init__(self, folders: Folders, engine: Supervisor, disk: Disk, base_models: dict[str, BaseModel]):
        self._base_models = base_models
        self._folders = folders
        self._engine = engine
        self._disk = disk
        self._making: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # while one is held

    async def make(self, sampler: messages.SamplerRef, fp8: messages.Fp8 | None) -> Export:
        """Full weights as they are saved are such a folder already. Raises CannotServe for weights that are
        not there, BadRequest for some that cannot be written so, Unavailable, StorageFull."""
        key, base_model = sampler.weights, sampler.base_model
        if key is not None:
            folder = await self._folders.whole(key)
            is_full = not is_adapter(folder) and (folder / "config.json").is_file()
            if is_full and fp8 is None:
                return await self._read(key, base_model, key)
        target = _key(sampler, self._base_models[base_model].digest, fp8)
        async with self._making.setdefault(target, asyncio.Lock()):
            folder = self._folders.here(target)
            if not folder.is_dir():
                self._disk.require_room()
                request_id = f"export-{uuid.uuid4().hex}"
                message = messages.ExportWeights(request_id, base_model, key, target, fp8)
                answer = await self._engine.request(message)
                if isinstance(answer, messages.Failed):
                    kind = BadRequest if answer.category == "user" else Unavailable
                    raise kind(f"the weights cannot be exported: {answer.message}")
            record = json.dumps({"base_model": base_model, "weights": key})
            folder.with_name(folder.name + _RECORD).write_text(record)
            return await self._read(target, base_model, key)

    async def find(self, key: str, base_model: str) -> Export | None:
        """A folder that a server says it has; None if it is not here, or not of that base model."""
        folder, weights = self._folders.here(key), key
        try:
            if key.startswith(f"{EXPORTS}/"):
                record = json.loads(folder.with_name(folder.name + _RECORD).read_text())
                if record["base_model"] != base_model:
                    return None
                weights = record["weights"]
            return await self._read(key, base_model, weights) if folder.is_dir() else None
        except (OSError, ValueError):
            return None

    async def remove_all_but(self, needed: Collection[str]) -> None:
        """Of those that are made here."""
        making = {key for key, lock in self._making.items() if lock.locked()}
        await asyncio.to_thread(self._remove, {*needed, *making})

    def _remove(self, needed: set[str]) -> None:
        for record in (self._folders.data_dir / EXPORTS).glob(f"*/*{_RECORD}"):
            folder = record.with_name(record.name.removesuffix(_RECORD))
            if folder.relative_to(self._folders.data_dir).as_posix() not in needed:
                shutil.rmtree(folder, ignore_errors=True)
                record.unlink(missing_ok=True)

    async def _read(self, key: str, base_model: str, weights: str | None) -> Export:
        folder = self._folders.here(key)
        tensors = await asyncio.to_thread(tensor_entries, folder)
        sizes = [file.stat().st_size for file in folder.glob("*.safetensors")]
        return Export(key, base_model, weights, tensors, sum(sizes), len(sizes))


def _key(sampler: messages.SamplerRef, base_digest: str | None, fp8: messages.Fp8 | None) -> str:
    """The same for the same weights in the same format."""
    if sampler.weights is None:
        named = f"{sampler.base_model}\0{base_digest}"
        of, version = "base", hashlib.sha256(named.encode()).hexdigest()[:16]
    else:
        _, of, *_, version = sampler.weights.split("/")
    if fp8 is not None:
        version += "@fp8-" + hashlib.sha256(msgspec.json.encode(fp8)).hexdigest()[:8]
    return paths.check_key(f"{EXPORTS}/{of}/{version}")
