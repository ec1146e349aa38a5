"""Whole models on SGLang servers: exported by the engine, checked, and loaded in place of what the servers
had.

A sequence is drawn with the weights of one version: samples on a server end first, or are aborted and
drawn again, new ones wait, and the server's cache of prefixes is flushed. A server whose load fails is
out of use until it has the wanted weights. If no server of a sync has taken the new weights, all go on
with those that they had.

Weights are checked against the model that a server was started with: a tensor of another shape ends the
server, and one in another format is misread.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import logging
import shutil
import time
import uuid
import weakref
from collections import defaultdict
from collections.abc import AsyncIterator, Collection, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import msgspec

from ....ckpt import paths
from ....engine import messages
from ...access import ApiKeys
from ...base_models import BaseModel
from ...errors import ApiError, BadRequest, Unavailable
from ...events import Tasks
from ...files import Disk, Entry, tensor_entries
from ...operations.operation import Operation
from ...settings import Settings
from ...supervision.supervisor import Supervisor
from .adapters import EXPORTS, Adapters, Folders, is_adapter, server_name
from .endpoint import EndpointError, EndpointUnflushed
from .endpoints import DEFAULT_VERSION, Endpoints, Registered

_RECORD = ".json"  # describes the folder beside it


@dataclass(frozen=True)
class Export:
    """A folder of full weights.

    `key` of the folder; `weights`: the key of the weights that it was made of; None: the base model.
    """

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
        """The number of parameters, without the scales of quantized ones."""
        return sum(prod(entry.shape) for name, entry in self.tensors.items() if "_scale" not in name)


class Exports:
    """The folders of full weights that the engine has made."""

    def __init__(self, folders: Folders, engine: Supervisor, disk: Disk, base_models: dict[str, BaseModel]):
        self._base_models = base_models
        self._folders = folders
        self._engine = engine
        self._disk = disk
        self._making: WeakValueDictionary[str, asyncio.Lock] = (
            WeakValueDictionary()
        )  # forgotten when nobody holds it

    async def make(self, sampler: messages.SamplerRef, fp8: messages.Fp8 | None) -> Export:
        """Make a folder of full weights, unless the saved weights are one already.

        Raises CannotServe for missing weights, BadRequest for weights that cannot be written in this format,
        Unavailable, StorageFull.
        """
        key, base_model = sampler.weights, sampler.base_model
        if key is not None:
            folder = await self._folders.whole(key)
            is_full = not is_adapter(folder) and (folder / "config.json").is_file()
            if is_full and fp8 is None:
                return await self._read(key, base_model, key)
        target = _export_key(sampler, self._base_models[base_model].digest, fp8)
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
        """Return the folder that a server reports; None if it is not here, or of another base model."""
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
        """Remove the folders that were made here, except the needed ones."""
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


def _export_key(sampler: messages.SamplerRef, base_digest: str | None, fp8: messages.Fp8 | None) -> str:
    """Return a key that is the same for the same weights in the same format."""
    if sampler.weights is None:
        named = f"{sampler.base_model}\0{base_digest}"
        of, version = "base", hashlib.sha256(named.encode()).hexdigest()[:16]
    else:
        _, of, *_, version = sampler.weights.split("/")
    if fp8 is not None:
        version += "@fp8-" + hashlib.sha256(msgspec.json.encode(fp8)).hexdigest()[:8]
    return paths.check_key(f"{EXPORTS}/{of}/{version}")


def misfit(export: Export, endpoint: Registered, base: BaseModel, folders: Folders) -> str | None:
    """Return why the server must not be sent the weights; None if it may.

    Raises OSError and ValueError.
    """
    if endpoint.limits is None or not endpoint.reachable:
        return f"it cannot be reached: {endpoint.problem}"
    quantization = endpoint.limits.quantization
    if quantization not in (None, "fp8"):
        return f"it computes in {quantization}; weights are sent as they are, or in fp8"
    if export.is_quantized != (quantization == "fp8"):
        is_in = "fp8" if quantization else endpoint.limits.dtype or "its model's dtype"
        return f"it was started in {is_in}: change set_sync_quantization, or start the server otherwise"
    if quantization is None:
        return _differ(export.tensors, base.tensors, base.head_name)
    theirs = Path(endpoint.limits.model_path)
    key = folders.key_of(endpoint.limits.model_path)
    if key is not None:
        theirs = folders.here(key)
    elif endpoint.owner is not None or not theirs.is_dir():
        return (
            "which of its matrices are in fp8, and in which blocks, cannot be seen from here: its model's "
            "folder has to be on a volume that both have, and the server be one of --sglang"
        )
    return _differ(export.tensors, tensor_entries(theirs), base.head_name)


def _differ(ours: dict[str, Entry], theirs: dict[str, Entry], head: str) -> str | None:
    for name, entry in ours.items():
        if name not in theirs:
            if name == head:
                return (
                    "the adapter has trained the unembedding, which the server shares with the embedding: "
                    "sample it as an adapter (LoRA), or train without it (train_unembed=False)"
                )
            return f"it has no {name}"
        if entry.shape != theirs[name].shape:
            return f"{name} has shape {entry.shape}; there it is {theirs[name].shape}"
        if _is_fp8(entry) != _is_fp8(theirs[name]):
            return f"{name} is {entry.dtype}; there it is {theirs[name].dtype}"
    missing = [name for name in theirs.keys() - ours.keys() if name != head and "inv_freq" not in name]
    return f"{min(missing)} is not among the weights, and would keep its old values" if missing else None


def _is_fp8(entry: Entry) -> bool:
    return entry.dtype.startswith("F8")


log = logging.getLogger("tinsmith.inference")

_AGAIN_SECONDS = (2.0, 5.0, 15.0, 60.0)  # before the second try, the third, ...


@dataclass
class Wanted:
    """The weights that a server should have, and its name for them."""

    export: Export
    version: str
    failures: int = 0
    again_at: float = 0.0


@dataclass(frozen=True)
class Pushed:
    """The result of sending weights to one server.

    `problem` None: it has the weights. `is_mixed`: it has them with the old cache and name. `seconds`: how
    long it waited for samples, and loaded.
    """

    endpoint: Registered
    problem: str | None = None
    is_mixed: bool = False
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Synced:
    """The result of sending weights to all servers."""

    export: Export
    version: str
    pushed: list[Pushed]
    seconds: dict[str, float]

    @property
    def success(self) -> bool:
        return bool(self.pushed) and all(each.problem is None for each in self.pushed)


class MergedWeights:
    """The full weights of each server; sends them again to servers that have lost them."""

    def __init__(
        self, folders: Folders, exports: Exports, endpoints: Endpoints, base_models: dict[str, BaseModel]
    ):
        self._folders = folders
        self._exports = exports
        self._endpoints = endpoints
        self._base_models = base_models
        self._wanted: weakref.WeakKeyDictionary[Registered, Wanted] = weakref.WeakKeyDictionary()
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)  # by URL
        self._tasks = Tasks()
        self._names: defaultdict[int, dict[str, str | None]] = defaultdict(lambda: {DEFAULT_VERSION: None})
        endpoints.other_weights.subscribe(self._other_weights)

    async def sync(
        self,
        sampler: messages.SamplerRef,
        servers: list[Registered],
        *,
        fp8: messages.Fp8 | None = None,
        version: str | None = None,
        abort: bool = False,
    ) -> Synced:
        """Send the weights to all of these servers, or to none if one of them must not have them.

        `version` is the servers' name for the weights; a number is added if other weights have it. `abort`:
        do not wait for running samples. Raises CannotServe or ApiError if the weights cannot be obtained.
        """
        times = [time.perf_counter()]
        export = await self._exports.make(sampler, fp8)
        times.append(time.perf_counter())
        name = self._name(export, version, {each.port for each in servers})
        pushed = await self._checked(export, servers)
        times.append(time.perf_counter())
        if all(each.problem is None for each in pushed):
            before = {each: (self._wanted.get(each), each.weights, each.weight_version) for each in servers}
            pushes = (self._push(each, Wanted(export, name), abort) for each in servers)
            pushed = await asyncio.gather(*pushes)
            if not any(each.problem is None for each in pushed):
                for each in pushed:
                    if not each.is_mixed:
                        await self._take_back(each, *before[each.endpoint])
        times.append(time.perf_counter())
        await self._exports.remove_all_but({each.export.key for each in self._wanted.values()})
        spent = (after - begin for begin, after in itertools.pairwise(times))
        return Synced(export, name, pushed, dict(zip(("export", "check", "push"), spent, strict=True)))

    async def close(self) -> None:
        await self._tasks.close()

    def _name(self, export: Export, asked: str | None, ports: set[int]) -> str:
        """Return the version name: the requested one, with a number if other weights have or had that name.

        Samples are recognised by the name, also by others who have registered the same server under another
        host.
        """
        known = [self._names[port] for port in ports]
        there = (each for each in self._endpoints.everybody() if each.port in ports)
        known += [{each.weight_version: each.weights} for each in there]
        name = own = asked or server_name(export.key)
        for count in itertools.count(2):
            if all(names.get(name, export.weights) == export.weights for names in known):
                break
            name = f"{own}.{count}"
        for port in ports:
            self._names[port][name] = export.weights
        return name

    # --- one server

    async def _checked(self, export: Export, servers: list[Registered]) -> list[Pushed]:
        base = self._base_models[export.base_model]

        def check(endpoint: Registered) -> str | None:
            try:
                return misfit(export, endpoint, base, self._folders)
            except (OSError, ValueError) as error:
                return f"its model's files cannot be read: {error}"

        problems = [await asyncio.to_thread(check, each) for each in servers]
        if any(problems):
            problems = [problem or "another server cannot take the weights" for problem in problems]
        return [Pushed(each, problem) for each, problem in zip(servers, problems, strict=True)]

    async def _push(self, endpoint: Registered, wanted: Wanted, abort: bool = False) -> Pushed:
        began = time.perf_counter()
        async with self._turns[endpoint.client.url], _alone(endpoint, abort):
            loading = time.perf_counter()
            self._wanted[endpoint] = wanted
            endpoint.holds(wanted.export.weights, wanted.version)
            try:
                path = self._folders.there(wanted.export.key)
                update = endpoint.client.update_weights_from_disk(path, wanted.version)
                await endpoint.while_up(update)
            except EndpointError as error:
                pause = _AGAIN_SECONDS[min(wanted.failures, len(_AGAIN_SECONDS) - 1)]
                wanted.failures, wanted.again_at = wanted.failures + 1, time.monotonic() + pause
                endpoint.eject(f"it has not taken weights: {error.message}")
                return Pushed(endpoint, error.message, isinstance(error, EndpointUnflushed))
            wanted.failures = 0
        with suppress(EndpointError):  # the next regular check is soon
            await self._endpoints.check(endpoint)
        seconds = {"waited": loading - began, "loaded": time.perf_counter() - loading}
        log.info("%s has %s after %.2f s", endpoint.client.url, wanted.version, sum(seconds.values()))
        return Pushed(endpoint, seconds=seconds)

    async def _take_back(
        self, pushed: Pushed, wanted: Wanted | None, weights: str | None, version: str
    ) -> None:
        """Undo a failed sync on one server: the earlier weights are its wanted ones again."""
        endpoint = pushed.endpoint
        if wanted is None:
            self._wanted.pop(endpoint, None)
        else:
            self._wanted[endpoint] = wanted
        endpoint.holds(weights, version)
        with suppress(EndpointError):
            await self._endpoints.check(endpoint)

    # --- servers that come back

    def _other_weights(self, endpoint: Registered, info: dict[str, Any]) -> None:
        if self._turns[endpoint.client.url].locked():
            return
        wanted = self._wanted.get(endpoint)
        was_given_others = (
            wanted is not None and not wanted.failures and info.get("weight_version") != DEFAULT_VERSION
        )
        if (
            wanted is None or was_given_others
        ):  # through another name of the same server, for example: the newest weights count
            self._tasks.begin(self._recognise(endpoint, info))
        elif time.monotonic() >= wanted.again_at:
            self._tasks.begin(self._again(endpoint, wanted))

    async def _again(self, endpoint: Registered, wanted: Wanted) -> None:
        """Send the weights again, after checking whether the server still fits."""
        (pushed,) = await self._checked(wanted.export, [endpoint])
        if pushed.problem is None:
            pushed = await self._push(endpoint, wanted)
        if pushed.problem is not None:
            log.warning("%s does not take %s: %s", endpoint.client.url, wanted.version, pushed.problem)

    async def _recognise(self, endpoint: Registered, info: dict[str, Any]) -> None:
        """Find out which of our folders the server has, after this server was restarted."""
        async with self._turns[endpoint.client.url]:
            key = self._folders.key_of(str(info.get("model_path")))
            if key is None or endpoint.base_model is None:
                return
            export = await self._exports.find(key, endpoint.base_model)
            if export is not None:
                wanted = Wanted(export, str(info.get("weight_version")))
                self._wanted[endpoint] = wanted
                endpoint.holds(export.weights, wanted.version)


@asynccontextmanager
async def _alone(endpoint: Registered, abort: bool) -> AsyncIterator[None]:
    """Keep others from sampling on the server. `abort`: running samples are ended, and drawn again."""

    async def end_all() -> None:
        with suppress(EndpointError):
            await endpoint.client.pause_generation("abort")
            await endpoint.client.continue_generation()

    ending = (
        asyncio.ensure_future(end_all()) if abort else None
    )  # starts once `exclusive` holds back new samples
    async with endpoint.exclusive():
        if ending is not None:
            await ending
        yield


# --- weights that are saved for sampling


class Distribution:
    """Sends weights saved for sampling to the SGLang servers: as adapters, or merged (`sglang_merge`)."""

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
        self._tasks = Tasks()

    def is_awaited(self, base_model: str, owner: str) -> bool:
        """Return whether an SGLang server will sample weights that the owner saves."""
        return bool(self._endpoints.of(base_model, owner))

    def own(self, owner: str, pools: Iterable[str] | None = None) -> list[Registered]:
        """Return the servers that may have the owner's full weights.

        These are its own ones, and the operator's if there is no other tenant, whose samples would have to be
        drawn elsewhere.
        """
        alone = self._keys.tenants <= {owner}
        return [each for each in self._endpoints.all(None, owner, pools) if alone or each.owner == owner]

    def follow(self, operation: Operation, save: messages.ToEngine | None, base_model: str) -> None:
        """Send the weights of an accepted save once they exist. `save` None: they have been sent."""
        if save is None or not self.is_awaited(base_model, operation.owner):
            return
        assert isinstance(save, messages.SaveSampler)
        sampler = messages.SamplerRef(base_model, save.directory)
        self._tasks.begin(self._send(operation, sampler))

    async def close(self) -> None:
        await self._tasks.close()
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
                log.warning("%s did not get %s: %s", each.endpoint.client.url, synced.version, each.problem)
