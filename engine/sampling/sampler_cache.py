"""Sampler weights by name: the last sampled ones are on the device, the others wait on disk."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from ...ckpt import digests, paths, peft
from ...model.config import ModelConfig
from ...model.load import load_base
from ...model.weight_files import WeightsError
from .. import messages
from ..budget import Budget
from ..errors import MissingWeights, UserError
from ..parking import Parked
from ..training.training_state import TrainingState
from .equal_weights import Source, are_equal, likeness
from .sampler import Sampler
from .sampler_weights import Weights

log = logging.getLogger(__name__)


@dataclass
class Resident:
    """Weights on the device. `source`: the training state's arrays that they are a copy of; `likeness`: None
    until they are compared with the others. `used`: of `Budget.now`."""

    weights: Weights
    sampled_at: float  # of time.monotonic
    used: int
    source: Source | None = None
    likeness: Hashable | None = None


class SamplerCache:
    """One base model's sampler, and the weights registered with it, by the key of their directory.

    Weights come from a model in training (`freeze`), or are read from their directory when they are first
    sampled. They leave the device when they were not sampled for `idle_seconds`, when something else needs
    the room (`budget`), or when all together exceed `bytes_on_device`, those not sampled for longest first
    (the newest stay, whatever their size); and come back when they are sampled again. Frozen weights stay in
    memory until `written` says that they are on disk. Keys whose weights are equal to the bit share one copy
    on the device, found when a model is frozen twice at one step, or when weights are sampled for the first
    time since they came to the device.
    """

    kind = "sampler_adapters"
    may_leave = True

    def __init__(
        self,
        new_sampler: Callable[[], Sampler],
        config: ModelConfig,
        data_dir: Path,
        dtype: Any,
        mesh: Mesh,
        bytes_on_device: int | None = None,
        idle_seconds: float = 600.0,
        budget: Budget | None = None,
    ):
        """Without `bytes_on_device` only the budget bounds them."""
        self._new_sampler = new_sampler
        self._config, self._data_dir, self._dtype, self._mesh = config, data_dir, dtype, mesh
        self._budget = budget or Budget(2**30)
        self._bytes: int | None = 0  # None: to be counted again
        self._bytes_on_device = bytes_on_device
        self._idle_seconds = idle_seconds
        self._resident: OrderedDict[str, Resident] = OrderedDict()  # sampled last comes last
        self._frozen: dict[str, Weights] = {}
        self._parked: dict[str, tuple[float, Parked]] = {}  # frozen ones, while they are not on the device
        self.sampler = new_sampler()
        self._budget.add(self)

    def add(self, request: messages.Sample) -> None:
        """Queue a request, after bringing its weights to the device if necessary. Raises UserError."""
        key = request.sampler.weights
        if key is not None:
            self._require(key)
        self.sampler.add(request, key)

    def freeze(self, key: str, state: TrainingState) -> Weights:
        """Copy a model's current weights, to be sampled as `key`."""
        self.release(key)
        residents = self._resident.values()
        same = next((each for each in residents if each.source and each.source.is_still(state.weights)), None)
        if same is not None and same.weights.scale == state.scale:
            self._share(key, same)
        elif state.lora is not None:
            self._register(key, {"adapter": state.weights, "scale": state.scale})
        else:  # full weights are sampled in the base's dtype
            self._register(key, {"base": jax.tree.map(lambda leaf: leaf.astype(self._dtype), state.weights)})
        self._resident[key].source = Source(state.weights)
        self._frozen[key] = self._resident[key].weights
        return self._frozen[key]

    def written(self, key: str) -> None:
        """Note that frozen weights are on disk. Safe to call from any thread."""
        self._frozen.pop(key, None)

    def release(self, key: str) -> None:
        """Forget weights. Requests already added still finish."""
        self._frozen.pop(key, None)
        self._parked.pop(key, None)
        self._leave(key)

    def evict_idle(self) -> float | None:
        """Let weights that were not sampled for long leave the device; return the seconds until the next are
        due."""
        now = time.monotonic()
        while self._resident:
            key, oldest = next(iter(self._resident.items()))
            if (left := oldest.sampled_at + self._idle_seconds - now) > 0:
                return left
            log.info("sampler weights %s leave the device, unused for %.0f s", key, self._idle_seconds)
            self._leave(key)
        return None

    def restart(self) -> None:
        """Replace a sampler that failed by a new one without requests."""
        self.sampler = self._new_sampler()
        self._resident.clear()
        self._bytes = 0

    def park(self) -> None:
        """Let the sampler and all weights leave the device, frozen ones for the host's memory.

        Until `unpark`, nothing may be sampled, and no request may be running.
        """
        copies: dict[tuple[int, ...], Parked] = {}  # by the arrays, which several keys may share
        for key, weights in self._frozen.items():
            own = (weights.adapter, weights.base if weights.adapter is None else None)
            arrays = tuple(map(id, jax.tree.leaves(own)))
            parked = copies.get(arrays) or copies.setdefault(arrays, Parked(own))
            self._parked[key] = weights.scale, parked
        self._frozen = {}
        self._resident.clear()
        self._bytes = 0
        del self.sampler

    def unpark(self) -> None:
        """Bring frozen weights back; the others come when they are sampled."""
        placed = {parked: parked.on_device() for _, parked in self._parked.values()}
        for key, (scale, parked) in self._parked.items():
            adapter, base = placed[parked]
            self._frozen[key] = Weights(base, None, adapter, scale)
        self._parked = {}
        self.sampler = self._new_sampler()

    def _require(self, key: str) -> None:
        """Make sure that weights are on the device."""
        if key not in self._resident:
            self._bring(key)
        elif (resident := self._resident[key]).likeness is None:
            resident.likeness, twin = self._compared(resident.weights.own, resident.weights.scale)
            if twin is not None:
                self.sampler.release(key)
                self._share(key, twin)
        resident = self._resident[key]
        resident.sampled_at, resident.used = time.monotonic(), self._budget.now()
        self._resident.move_to_end(key)

    def _bring(self, key: str) -> None:
        """Bring weights back to the device, unless equal ones are there."""
        frozen = self._frozen.get(key)
        if frozen is None:
            registered = self._read(key)
        elif frozen.adapter is None:
            registered = {"base": frozen.base}
        else:
            registered = {"adapter": frozen.adapter, "scale": frozen.scale}
        is_own = frozen is not None or "base" in registered
        arrays = registered["base"] if "base" in registered else registered["adapter"]
        known, twin = self._compared(arrays, registered.get("scale", 1.0))
        if twin is not None:
            self._share(key, twin)
        else:
            self._register(key, registered, owned=is_own)
            self._resident[key].likeness = known

    def _read(self, key: str) -> dict[str, Any]:
        """Read weights from their directory; return the arguments of `Sampler.register`."""
        began = time.perf_counter()
        directory = paths.resolve(self._data_dir, key)
        if not directory.is_dir():
            raise MissingWeights("these sampler weights no longer exist: save them again")
        registered: dict[str, Any]
        try:
            digests.check(directory)
            if peft.is_adapter(directory):
                saved = peft.load_adapter(directory, self._config)
                registered = {"adapter": saved.adapter, "scale": saved.alpha / saved.rank}
            else:
                registered = {"base": load_base(directory, self._config, self._dtype, self._mesh)}
        except digests.DamagedFiles as error:
            raise UserError("these sampler weights' files are damaged: save them again") from error
        except (peft.AdapterError, WeightsError) as error:
            raise UserError(f"these sampler weights do not fit the model: {error}") from error
        seconds = time.perf_counter() - began
        log.info("sampler weights %s: %.1f MB read in %.2f s", key, _size(registered) / 1e6, seconds)
        return registered

    def _compared(self, arrays: Any, scale: float) -> tuple[Hashable, Resident | None]:
        """Return the likeness of weights, and those on the device that are equal to them."""
        known = likeness(arrays, scale)
        for resident in self._resident.values():
            if resident.likeness == known and are_equal(resident.weights.own, arrays):
                return known, resident
        return known, None

    def _share(self, key: str, twin: Resident) -> None:
        """Register the weights of `twin` as `key` too."""
        self.sampler.share(key, twin.weights)
        self._bytes = None
        self._resident[key] = Resident(
            self.sampler.weights_of(key), time.monotonic(), self._budget.now(), twin.source, twin.likeness
        )

    def _register(self, key: str, registered: dict[str, Any], owned: bool = False) -> None:
        """Bring weights (the arguments of `Sampler.register`) to the device, evicting older ones.

        `owned` arrays are shared between this cache and the sampler.
        """
        size = _size(registered)
        while self._bytes_on_device and self._resident and size + self.bytes > self._bytes_on_device:
            self.drop_oldest()
        self._budget.make_room(size)
        self.sampler.register(key, **registered, owned=owned)
        self._bytes = None
        self._resident[key] = Resident(self.sampler.weights_of(key), time.monotonic(), self._budget.now())

    def _leave(self, key: str) -> None:
        if self._resident.pop(key, None) is not None:
            self._bytes = None
            self.sampler.release(key)

    @property
    def oldest(self) -> int | None:
        """The time at which the least recently sampled weights were sampled (`Budget.now`)."""
        return next(iter(self._resident.values())).used if self._resident else None

    def drop_oldest(self) -> None:
        """Let the least recently sampled weights leave the device."""
        self._leave(next(iter(self._resident)))

    @property
    def bytes(self) -> int:
        """The bytes of the weights on the device. Weights under several keys count once."""
        if self._bytes is None:
            leaves = (leaf for each in self._resident.values() for leaf in jax.tree.leaves(each.weights.own))
            self._bytes = sum({id(leaf): leaf.nbytes for leaf in leaves}.values())
        return self._bytes


def _size(registered: dict[str, Any]) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(registered) if hasattr(leaf, "nbytes"))
