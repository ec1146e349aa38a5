"""Adapters on SGLang servers: each is loaded from its folder under a name of its own, and unloaded by LRU.

A name says the model and the version, and stands for one folder that never changes: so it is right whenever
a server knows it, also when the server has evicted it and reads it again from where it was. What is not known
to be loaded is loaded when it is first sampled; what is saved is loaded ahead of that.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import weakref
from collections import OrderedDict
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any

from ....engine import messages
from ...base_models import BaseModel
from ...settings import Settings
from .adapter_folders import is_adapter, problem
from .endpoint import CannotServe, EndpointError, EndpointRefused
from .endpoints import Endpoints, Registered
from .folders import Folders, server_name

log = logging.getLogger("tinsmith.inference")

RECENT = 8
"""Adapters that a server gets when it comes (back) up: those that it used last, and those saved last."""


@dataclass
class Loaded:
    """What one server has in one life: names and the samplers that they are of, that used last comes last."""

    life: int
    names: OrderedDict[str, messages.SamplerRef] = field(default_factory=OrderedDict)
    loading: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


class Adapters:
    """Is told by `endpoints` of new lives."""

    def __init__(
        self,
        settings: Settings,
        folders: Folders,
        endpoints: Endpoints,
        base_models: dict[str, BaseModel],
    ):
        self._limit = settings.sglang_adapters
        self._folders = folders
        self._endpoints = endpoints
        self._base_models = base_models
        self._loaded: weakref.WeakKeyDictionary[Registered, Loaded] = weakref.WeakKeyDictionary()
        self._saved: OrderedDict[messages.SamplerRef, str] = OrderedDict()  # and whose, the newest last
        self._tasks: set[asyncio.Task[None]] = set()
        endpoints.revived.subscribe(self._new_life)

    async def ensure(self, endpoint: Registered, sampler: messages.SamplerRef) -> str:
        """The name under which the server has the adapter now; it may be loaded first, once for all who ask.

        Raises CannotServe where it never can be, EndpointDied or EndpointBusy.
        """
        assert sampler.weights is not None, "a base model is no adapter"
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
        """The server does not know the name any more."""
        assert sampler.weights is not None
        self._of(endpoint).names.pop(server_name(sampler.weights), None)

    def saved(self, owner: str, sampler: messages.SamplerRef) -> None:
        """Loads it ahead of its first sample, wherever its owner's samples may go."""
        self._saved[sampler] = owner
        while len(self._saved) > RECENT:
            self._saved.popitem(last=False)
        for endpoint in self._endpoints.of(sampler.base_model, owner):
            self._bring(endpoint, [sampler])

    def removed(self, key: str) -> None:
        """The weights are being deleted: no server needs them any more."""
        name = server_name(key)
        for sampler in [each for each in self._saved if each.weights == key]:
            del self._saved[sampler]
        for endpoint, loaded in self._loaded.items():
            if loaded.names.pop(name, None) is not None and endpoint.healthy:
                self._begin(self._unload(endpoint, name))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

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
                # Of an earlier life of this server's: a name is always of the same adapter.
                if "already loaded" not in error.detail:
                    raise CannotServe(error.message) from None
            loaded.names[name] = sampler

    async def _check(self, endpoint: Registered, sampler: messages.SamplerRef) -> None:
        """Raises CannotServe for what would end the server, or be computed otherwise than here."""
        assert sampler.weights is not None
        limits = endpoint.limits
        if limits is not None and not limits.enable_lora:
            raise CannotServe(f"{endpoint.client.url} takes no adapters: start it with --enable-lora")
        folder = await self._folders.whole(sampler.weights)
        if not is_adapter(folder):
            raise CannotServe("these are full weights: sync_inference_weights brings them to a server")
        base = self._base_models[sampler.base_model]
        max_rank = None if limits is None else limits.max_lora_rank
        try:
            found = await asyncio.to_thread(lambda: problem(folder, base.tensors, max_rank))
        except (OSError, ValueError, KeyError) as error:
            found = f"the adapter's files cannot be read: {error!r}"
        if found is not None:
            raise CannotServe(found)

    async def _unload(self, endpoint: Registered, name: str) -> None:
        with contextlib.suppress(EndpointRefused):  # it has evicted it itself
            await endpoint.client.unload_lora_adapter(name)

    # --- ahead of samples

    def _new_life(self, endpoint: Registered) -> None:
        """A server is new here, or restarted."""
        before = self._loaded.get(endpoint)
        wanted = dict.fromkeys(before.names.values() if before is not None else ())
        for sampler, owner in self._saved.items():
            if sampler.base_model == endpoint.base_model and endpoint.owner in (None, owner):
                wanted[sampler] = None
        self._bring(endpoint, list(wanted)[-RECENT:])

    def _bring(self, endpoint: Registered, samplers: Iterable[messages.SamplerRef]) -> None:
        self._begin(self._bring_each(endpoint, list(samplers)))

    async def _bring_each(self, endpoint: Registered, samplers: list[messages.SamplerRef]) -> None:
        for sampler in samplers if endpoint.weights is None else ():
            try:
                await self.ensure(endpoint, sampler)
            except CannotServe as error:
                log.info("%s is not loaded on %s: %s", sampler.weights, endpoint.client.url, error.message)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        async def quietly() -> None:
            try:
                await work
            except EndpointError as error:  # it will be asked again, or comes back
                log.info("%s", error.message)

        task = asyncio.ensure_future(quietly())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
