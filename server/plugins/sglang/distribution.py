"""What is saved to be sampled goes to the SGLang servers: as adapters, or as whole models."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from ....engine import messages
from ...access.keys import ApiKeys
from ...base_models import BaseModel
from ...errors import ApiError
from ...files import Disk
from ...operations.operation import Operation
from ...settings import Settings
from ...supervision.supervisor import Supervisor
from .adapters import Adapters, Folders
from .endpoint import EndpointError
from .endpoints import Endpoints, Registered
from .exports import Exports
from .merged_weights import MergedWeights

log = logging.getLogger("tinsmith.inference")


class Distribution:
    """`settings.sglang_merge`: every sampler's weights that are saved replace those that the servers have."""

    def __init__(
        self,
        settings: Settings,
        keys: ApiKeys,
        engine: Supervisor,
        disk: Disk,
        endpoints: Endpoints,
        base_models: dict[str, BaseModel],
    ):
        folders = Folders(settings.data_dir, settings.sglang_data_dir)
        self.adapters = Adapters(settings, folders, endpoints, base_models)
        self.merged = MergedWeights(
            folders, Exports(folders, engine, disk, base_models), endpoints, base_models
        )
        self._keys = keys
        self._endpoints = endpoints
        self._merges = settings.sglang_merge
        self._tasks: set[asyncio.Task[None]] = set()

    def is_awaited(self, base_model: str, owner: str) -> bool:
        """Whether weights that the owner saves will be sampled elsewhere."""
        return bool(self._endpoints.of(base_model, owner))

    def own(self, owner: str, pools: Iterable[str] | None = None) -> list[Registered]:
        """Servers that may have the owner's full weights: its own, and the operator's where it is the only
        tenant, for the others' samples would have to go elsewhere."""
        alone = self._keys.tenants <= {owner}
        return [each for each in self._endpoints.all(None, owner, pools) if alone or each.owner == owner]

    def follow(self, operation: Operation, save: messages.ToEngine | None, base_model: str) -> None:
        """A save that was accepted: its weights go out as soon as they are there. None: they have."""
        if save is None or not self.is_awaited(base_model, operation.owner):
            return
        assert isinstance(save, messages.SaveSampler)
        sampler = messages.SamplerRef(base_model, save.directory)
        task = asyncio.ensure_future(self._send(operation, sampler))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.adapters.close()
        await self.merged.close()

    async def _send(self, operation: Operation, sampler: messages.SamplerRef) -> None:
        await operation.finished.wait()
        if not isinstance(operation.answer, messages.Done):
            return
        if not self._merges:
            self.adapters.saved(operation.owner, sampler)
            return
        servers = [each for each in self.own(operation.owner) if each.base_model == sampler.base_model]
        try:
            synced = await self.merged.sync(sampler, servers)
        except (ApiError, EndpointError) as error:
            log.warning("%s is not on any server: %s", sampler.weights, error.message)
            return
        for each in synced.pushed:
            if each.problem is not None:
                log.warning("%s has not got %s: %s", each.endpoint.client.url, synced.version, each.problem)
