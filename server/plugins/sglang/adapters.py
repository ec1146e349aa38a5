"""Adapters on SGLang servers: loaded from their folders under names of their own, and unloaded by LRU.

A name contains the model and the version, and stands for one folder that never changes. So it is right
whenever a server knows it, even if the server evicted the adapter and reads it again. An adapter that is not
known to be loaded is loaded when it is first sampled; a saved one is loaded ahead of that.

A folder is checked before a server loads it. SGLang reads q, k and v as one matrix, and gate and up; an
adapter of only some of them is accepted, and ends the server at its first use. SGLang always scales by
lora_alpha / r, whatever else the config says. Adapters whose modules have other names in SGLang than in the
base model's files are not sent: those of experts, delta nets, Mamba-2 and text halves.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ....ckpt import paths
from ....engine import messages
from ...base_models import BaseModel
from ...events import Tasks
from ...files import tensor_entries
from ...settings import Settings
from .endpoint import CannotServe, EndpointError, EndpointRefused
from .endpoints import Endpoints, Registered

WAIT_SECONDS = 60.0
"""The longest wait for a folder whose save was answered before it was written.

If the engine died with it, sampling from the engine makes it again.
"""
_LOOK_SECONDS = 0.01
EXPORTS = "exports"  # of full weights that are made for servers


class Folders:
    """Folders below the data directory, which the servers have mounted at `seen_as`."""

    def __init__(self, data_dir: Path, seen_as: Path | None):
        self.data_dir = data_dir.resolve()
        self._seen_as = seen_as or self.data_dir

    def here(self, key: str) -> Path:
        return paths.resolve(self.data_dir, key)

    def there(self, key: str) -> str:
        """Return the path of a folder on the servers."""
        return str(self._seen_as / paths.check_key(key))

    def key_of(self, path_there: str) -> str | None:
        """Return the key of a server's path; None for one that is not below the data directory."""
        try:
            return paths.check_key(Path(path_there).relative_to(self._seen_as).as_posix())
        except ValueError:
            return None

    async def whole(self, key: str) -> Path:
        """Wait until the folder exists, which is then complete; return its path.

        Raises CannotServe if it does not appear.
        """
        folder, deadline = self.here(key), time.monotonic() + WAIT_SECONDS
        while not await asyncio.to_thread(folder.is_dir):
            if time.monotonic() > deadline:
                raise CannotServe("these weights are not on disk")
            await asyncio.sleep(_LOOK_SECONDS)
        return folder


def server_name(key: str) -> str:
    """Return the servers' name for the weights of a directory key: their model and version."""
    return ".".join(part for part in key.split("/") if part not in ("checkpoints", "samplers"))


CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_CHANGES_THE_FUNCTION = (
    *("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out"),
    "trainable_token_indices",
)


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file()


def problem(folder: Path, base: BaseModel, max_rank: int | None) -> str | None:
    """Return why a server with this base model cannot load an adapter; None if it can.

    Raises OSError or ValueError for missing or damaged files.
    """
    config = json.loads((folder / CONFIG_FILE).read_text())
    changed = [key for key in _CHANGES_THE_FUNCTION if config.get(key)]
    if changed:
        return f"the adapter uses {', '.join(changed)}, which SGLang does not compute"
    rank = config["r"]
    if max_rank is not None and rank > max_rank:
        return f"the adapter's rank is {rank}, the server was started with --max-lora-rank {max_rank}"
    sides: defaultdict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name, entry in tensor_entries(folder / TENSORS_FILE).items():
        module, _, side = name.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        sides[module][side] = entry.shape
    for module, shapes in sides.items():
        matrix = base.tensors.get(f"{module}.weight")
        if matrix is None and module == "lm_head":
            matrix = base.tensors.get("model.embed_tokens.weight")  # the embedding is tied
        if matrix is None:
            return _unmatched(module, base)
        out, into = matrix.shape
        if shapes != {"lora_A": (rank, into), "lora_B": (out, rank)}:
            return f"the adapter's {module} has shapes {shapes}; the base model's matrix is {matrix.shape}"
    return _torn(set(sides), base.merged_modules)


def _unmatched(module: str, base: BaseModel) -> str:
    """Return why an adapter is not sent that has a module under no tensor's name of the base model."""
    config, known = base.config, frozenset[str]().union(*base.adapter_modules.values())
    if config.mixtures and ".experts." in module:
        kind = "adapters of experts"
    elif "language_model" in config.prefix:
        kind = "adapters of the text half of a model that sees"
    elif module.rpartition(".")[2] in known:
        kind = f"adapters of {config.family} models"
    else:
        return f"the adapter has {module}, which the base model does not have"
    return (
        f"{kind} ({module}) are not sent to SGLang servers, which can have the merged model instead: "
        "sync_inference_weights, or tinsmith serve --sglang-merge"
    )


def _torn(modules: set[str], groups: Iterable[frozenset[str]]) -> str | None:
    layers: defaultdict[str, set[str]] = defaultdict(set)
    for module in modules:
        parent, _, name = module.rpartition(".")
        layers[parent].add(name)
    for parent, names in layers.items():
        for group in groups:
            if names & group and not group <= names:
                return f"the adapter has {sorted(names & group)} of {parent}, but not {sorted(group - names)}"
    return None


log = logging.getLogger("tinsmith.inference")

RECENT = 8
"""So many adapters are loaded on a server when it starts: those it used last, and those saved last."""


@dataclass
class Loaded:
    """The adapters of one server in one of its lives: names and their samplers, the last used one last."""

    life: int
    names: OrderedDict[str, messages.SamplerRef] = field(default_factory=OrderedDict)
    loading: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


class Adapters:
    """The adapters on all servers. A server that starts again is given its recent ones."""

    def __init__(
        self, settings: Settings, folders: Folders, endpoints: Endpoints, base_models: dict[str, BaseModel]
    ):
        self._limit = settings.sglang_adapters
        self._folders = folders
        self._endpoints = endpoints
        self._base_models = base_models
        self._loaded: weakref.WeakKeyDictionary[Registered, Loaded] = weakref.WeakKeyDictionary()
        self._saved: OrderedDict[messages.SamplerRef, str] = (
            OrderedDict()
        )  # with their owners, the newest last
        self._tasks = Tasks()
        endpoints.revived.subscribe(self._new_life)

    async def ensure(self, endpoint: Registered, sampler: messages.SamplerRef) -> str:
        """Return the name of the adapter on the server, loading it first if necessary, once for all who wait.

        Raises CannotServe if it can never be loaded, EndpointDied or EndpointBusy.
        """
        assert sampler.weights is not None, "a base model is not an adapter"
        name, loaded = server_name(sampler.weights), self._of(endpoint)
        sampler = messages.SamplerRef(sampler.base_model, sampler.weights)
        if name in loaded.names:
            loaded.names.move_to_end(name)
            return name
        if name not in loaded.loading:
            task = asyncio.ensure_future(self._load(endpoint, loaded, name, sampler))
            loaded.loading[name] = task
            task.add_done_callback(lambda _task: loaded.loading.pop(name, None))
        await asyncio.shield(loaded.loading[name])
        return name

    def lost(self, endpoint: Registered, sampler: messages.SamplerRef) -> None:
        """Note that the server no longer knows the name."""
        assert sampler.weights is not None
        self._of(endpoint).names.pop(server_name(sampler.weights), None)

    def saved(self, owner: str, sampler: messages.SamplerRef) -> None:
        """Load a saved adapter ahead of its first sample, on the servers that may sample it."""
        self._saved[sampler] = owner
        while len(self._saved) > RECENT:
            self._saved.popitem(last=False)
        for endpoint in self._endpoints.of(sampler.base_model, owner):
            self._bring(endpoint, [sampler])

    def removed(self, key: str) -> None:
        """Forget weights that are being deleted."""
        name = server_name(key)
        for sampler in [each for each in self._saved if each.weights == key]:
            del self._saved[sampler]
        for endpoint, loaded in self._loaded.items():
            if loaded.names.pop(name, None) is not None and endpoint.healthy:
                self._begin(self._unload(endpoint, name))

    async def close(self) -> None:
        await self._tasks.close()

    # --- one server

    def _of(self, endpoint: Registered) -> Loaded:
        loaded = self._loaded.get(endpoint)
        if loaded is None or loaded.life != endpoint.life:
            loaded = self._loaded[endpoint] = Loaded(endpoint.life)
        return loaded

    async def _load(
        self, endpoint: Registered, loaded: Loaded, name: str, sampler: messages.SamplerRef
    ) -> None:
        await self._check(endpoint, sampler)
        assert sampler.weights is not None
        async with loaded.turn:
            limit = (endpoint.limits and endpoint.limits.max_loaded_loras) or self._limit
            while len(loaded.names) >= limit:
                oldest, _ = loaded.names.popitem(last=False)
                await self._unload(endpoint, oldest)
            try:
                await endpoint.client.load_lora_adapter(name, self._folders.there(sampler.weights))
            except EndpointRefused as error:
                # From an earlier life of this server: a name always means the same adapter.
                if "already loaded" not in error.detail:
                    raise CannotServe(error.message) from None
            loaded.names[name] = sampler

    async def _check(self, endpoint: Registered, sampler: messages.SamplerRef) -> None:
        """Raise CannotServe for an adapter that would end the server, or be computed differently there."""
        assert sampler.weights is not None
        limits = endpoint.limits
        if limits is not None and not limits.enable_lora:
            raise CannotServe(f"{endpoint.client.url} takes no adapters: start it with --enable-lora")
        folder = await self._folders.whole(sampler.weights)
        if not is_adapter(folder):
            raise CannotServe("these are full weights: sync_inference_weights sends them to a server")
        base = self._base_models[sampler.base_model]
        max_rank = None if limits is None else limits.max_lora_rank
        try:
            found = await asyncio.to_thread(lambda: problem(folder, base, max_rank))
        except (OSError, ValueError, KeyError) as error:
            found = f"the adapter's files cannot be read: {error!r}"
        if found is not None:
            raise CannotServe(found)

    async def _unload(self, endpoint: Registered, name: str) -> None:
        with contextlib.suppress(EndpointRefused):  # the server had evicted it
            await endpoint.client.unload_lora_adapter(name)

    # --- ahead of samples

    def _new_life(self, endpoint: Registered) -> None:
        """Load the recent adapters on a server that is new or has restarted."""
        before = self._loaded.get(endpoint)
        wanted = dict.fromkeys(before.names.values() if before is not None else ())
        for sampler, owner in self._saved.items():
            if sampler.base_model == endpoint.base_model and endpoint.owner in (None, owner):
                wanted[sampler] = None
        self._bring(endpoint, list(wanted)[-RECENT:])

    def _bring(self, endpoint: Registered, samplers: Iterable[messages.SamplerRef]) -> None:
        async def bring() -> None:
            for sampler in samplers if endpoint.weights is None else ():
                try:
                    await self.ensure(endpoint, sampler)
                except CannotServe as error:
                    log.info(
                        "%s is not loaded on %s: %s", sampler.weights, endpoint.client.url, error.message
                    )

        self._begin(bring())

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        async def quietly() -> None:
            try:
                await work
            except EndpointError as error:  # tried again at the next sample, or when the server is back
                log.info("%s", error.message)

        self._tasks.begin(quietly())
