"""Sampler weights by name: those sampled last are on the device, the others wait on disk."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from ..ckpt import paths, peft
from ..model.config import ModelConfig
from ..model.load import WeightsError, load_base
from . import messages
from .errors import UserError
from .sampler import Sampler
from .training_state import TrainingState

log = logging.getLogger(__name__)

BYTES_ON_DEVICE = 4 << 30


class SamplerCache:
    """One base model's sampler, and the weights registered with it.

    Weights of a directory are read when they are first sampled; those not sampled for longest give way when
    all together exceed `bytes_on_device` (the newest stay, whatever their size). Snapshots have no place on
    disk and stay until they are released.
    """

    def __init__(
        self,
        new_sampler: Callable[[], Sampler],
        config: ModelConfig,
        data_dir: Path,
        dtype: Any,
        mesh: Mesh,
        bytes_on_device: int = BYTES_ON_DEVICE,
    ):
        self._new_sampler = new_sampler
        self._config, self._data_dir, self._dtype, self._mesh = config, data_dir, dtype, mesh
        self._bytes_on_device = bytes_on_device
        self._sizes: OrderedDict[str, int] = OrderedDict()  # of directories; sampled last comes last
        self.sampler = new_sampler()

    def add(self, request: messages.Sample) -> None:
        """Queue a request, its weights read from disk first if need be. Raises UserError."""
        self.sampler.add(request, self._require(request.sampler))

    def add_snapshot(self, name: str, state: TrainingState) -> int:
        """Freeze a model's current weights in memory under `name`; their size in bytes."""
        registered = self._registered(state.lora is not None, state.weights, state.scale)
        self.release_snapshot(name)
        self.sampler.register(_snapshot_key(name), **registered)
        return _size(registered)

    def release_snapshot(self, name: str) -> None:
        self.sampler.release(_snapshot_key(name))

    def restart(self) -> None:
        """A new sampler in place of one that failed: no requests, no snapshots; directories stay on disk."""
        self.sampler = self._new_sampler()
        self._sizes.clear()

    def _require(self, ref: messages.SamplerRef) -> str | None:
        """The sampler's key of the weights, which are registered now."""
        if ref.snapshot is not None:
            if _snapshot_key(ref.snapshot) not in self.sampler:
                raise UserError("these sampler weights are gone: save them again")
            return _snapshot_key(ref.snapshot)
        if ref.weights is None:
            return None
        if ref.weights not in self._sizes:
            self._read(ref.weights)
        self._sizes.move_to_end(ref.weights)
        return ref.weights

    def _read(self, key: str) -> None:
        began = time.perf_counter()
        directory = paths.resolve(self._data_dir, key)
        if not directory.is_dir():
            raise UserError("these sampler weights are not there (any more): save them again")
        try:
            if peft.is_adapter(directory):
                saved = peft.load_adapter(directory, self._config)
                registered = self._registered(True, saved.adapter, saved.alpha / saved.rank)
            else:
                registered = {"base": load_base(directory, self._config, self._dtype, self._mesh)}
        except (peft.AdapterError, WeightsError) as error:
            raise UserError(f"these sampler weights do not fit the model: {error}") from error
        size = _size(registered)
        while self._sizes and sum(self._sizes.values()) + size > self._bytes_on_device:
            oldest, _ = self._sizes.popitem(last=False)
            self.sampler.release(oldest)
        self.sampler.register(key, **registered)
        self._sizes[key] = size
        log.info("sampler weights %s: %.1f MB read in %.2f s", key, size / 1e6, time.perf_counter() - began)

    def _registered(self, is_adapter: bool, weights: Any, scale: float) -> dict[str, Any]:
        """The arguments of `Sampler.register`. Full weights are sampled in the base's dtype."""
        if is_adapter:
            return {"adapter": weights, "scale": scale}
        return {"base": jax.tree.map(lambda leaf: leaf.astype(self._dtype), weights)}


def _snapshot_key(name: str) -> str:
    return f"snapshot/{name}"


def _size(registered: dict[str, Any]) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(registered) if hasattr(leaf, "nbytes"))
