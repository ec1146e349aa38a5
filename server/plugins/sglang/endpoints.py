"""The registered SGLang servers: whose they are, what they serve, and whether they are healthy.

The operator's (`--sglang`) serve every tenant; a tenant's own, which the ledger keeps, serve only that
tenant. Each is asked every two seconds for its model, which costs it nothing. One that cannot be reached,
or is not what it was registered as, is out of use until it is again; one that fails repeatedly is left
out for longer each time.

Keys of tenants' servers are encrypted in the ledger, as age files (https://age-encryption.org/v1). The
identity that opens them is in the data directory, in a file that only the server's user can read: a copy
of the ledger alone opens nothing.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import pyrage
from sqlalchemy import Row

from ...addresses import Allowed, host_and_port, url_of
from ...base_models import BaseModel
from ...events import Event
from ...files import read_or_create
from ...ledger import plugins as plugin_rows
from ...ledger.ledger import Ledger
from ...settings import Settings
from .endpoint import (
    AnswerBytes,
    Endpoint,
    EndpointBusy,
    EndpointDied,
    EndpointError,
    EndpointSilent,
    Limits,
    are_tempered,
    base_model_of,
    limits_of,
    mismatch,
)

log = logging.getLogger("tinsmith.inference")

CHECK_SECONDS = 2.0
DEFAULT_VERSION = "default"
"""SGLang's version name of the weights that it was started with."""
_FAILED_CHECKS = 3  # in a row: a busy server may be slow, which alone does not mean that it is dead
_VERSION_CHARACTERS = 128
_FLAPPING_SECONDS = 600.0
_OUT_SECONDS = (0.0, 2.0, 5.0, 15.0, 60.0)  # after the first death within that time, the second, ...

T = TypeVar("T")


@dataclass(eq=False)
class Registered:
    """One registered server and its state.

    `owner` None: the operator's. `base_model` None: not known yet. `life` grows by one each time the server
    comes up, which may have lost its adapters. `weights` is the key of weights that replace its base model's,
    `weight_version` the server's name for them.
    """

    client: Endpoint
    owner: str | None
    base_model: str | None
    pool: str = "default"
    healthy: bool = False
    reachable: bool = False
    life: int = 0
    limits: Limits | None = None
    weights: str | None = None
    weight_version: str = DEFAULT_VERSION
    problem: str = "it has not been checked yet"
    running: int = 0  # samples
    answered: int = 0
    checked: asyncio.Event = field(default_factory=asyncio.Event)  # once
    _down: asyncio.Event = field(default_factory=asyncio.Event)  # of this life
    _deaths: list[float] = field(default_factory=list)
    _failed_checks: int = 0
    _out_until: float = 0.0
    _is_exclusive: bool = False
    _turn: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def host(self) -> str:
        return host_and_port(self.client.url)[0]

    @property
    def port(self) -> int:
        return host_and_port(self.client.url)[1]

    # --- who uses it

    @asynccontextmanager
    async def sampling(self) -> AsyncIterator[None]:
        """Hold the server's weights while a sample runs there."""
        while self._is_exclusive:
            await self._turn.wait()
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self._next_turn()

    @asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        """Wait until our samples there have ended, and hold back others."""
        while self._is_exclusive:
            await self._turn.wait()
        self._is_exclusive = True
        try:
            while self.running:
                await self._turn.wait()
            yield
        finally:
            self._is_exclusive = False
            self._next_turn()

    def _next_turn(self) -> None:
        self._turn.set()
        self._turn = asyncio.Event()

    async def while_up(self, asked: Awaitable[T]) -> T:
        """Await a request to the server. Raises EndpointDied as soon as the server is known to be down."""
        task, down = asyncio.ensure_future(asked), asyncio.ensure_future(self._down.wait())
        try:
            await asyncio.wait({task, down}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise EndpointDied(f"{self.client.url}: {self.problem}")
            return task.result()
        finally:
            task.cancel()
            down.cancel()

    # --- how it is

    def holds(self, weights: str | None, weight_version: str) -> None:
        """Set the weights that the server has, or must have before it is used again."""
        self.weights, self.weight_version = weights, weight_version

    def eject(self, why: str) -> None:
        """Take the server out of use until the next good check; its running samples are lost."""
        if self.reachable:
            log.warning("%s is out of use: %s", self.client.url, why)
        self.leave(why)

    def leave(self, why: str) -> None:
        self.healthy = self.reachable = False
        self.problem = why
        self._down.set()

    def died(self, why: str) -> None:
        """Eject the server, for longer if it died recently."""
        if self.reachable:
            now = time.monotonic()
            self._deaths = [at for at in self._deaths if now - at < _FLAPPING_SECONDS] + [now]
            self._out_until = now + _OUT_SECONDS[min(len(self._deaths), len(_OUT_SECONDS)) - 1]
        self.eject(why)

    @property
    def may_return(self) -> bool:
        return time.monotonic() >= self._out_until

    def up(self, limits: Limits) -> None:
        self.limits, self.reachable, self.life = limits, True, self.life + 1
        self._down = asyncio.Event()

    def check_failed(self, error: EndpointError) -> None:
        """Note a failed check. A closed connection ejects at once, slowness only after a few checks."""
        self._failed_checks += 1
        is_slow = isinstance(error, (EndpointSilent, EndpointBusy))
        if not self.reachable:
            self.problem = error.message
        elif not is_slow or self._failed_checks >= _FAILED_CHECKS:
            self.died(error.message)

    def check_passed(self) -> None:
        self._failed_checks = 0


class Endpoints:
    """The registered servers and their health.

    Events: `revived(endpoint)` when a server is healthy for the first time or again, with none of its earlier
    adapters; `other_weights(endpoint, info)` at every check of a server that has other weights than it
    should, with its model's info.
    """

    def __init__(self, base_models: dict[str, BaseModel]):
        self._base_models = base_models
        self._registered: dict[Registered, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self.revived: Event[[Registered]] = Event()
        self.other_weights: Event[[Registered, dict[str, Any]]] = Event()

    # --- which there are

    def all(
        self, base_model: str | None = None, owner: str | None = None, pools: Iterable[str] | None = None
    ) -> list[Registered]:
        """Return the operator's and the owner's servers, of a base model (None: any) and pools (None:
        all)."""
        return [
            each
            for each in self._registered
            if each.owner in (None, owner)
            and base_model in (None, each.base_model)
            and (pools is None or each.pool in pools)
        ]

    def of(
        self, base_model: str, owner: str | None = None, pools: Iterable[str] | None = None
    ) -> list[Registered]:
        """Return those that are healthy, the one with the fewest samples first."""
        healthy = [each for each in self.all(base_model, owner, pools) if each.healthy]
        return sorted(healthy, key=lambda endpoint: endpoint.running)

    def everybody(self) -> list[Registered]:
        """Return the servers of the operator and all tenants."""
        return list(self._registered)

    def find(self, owner: str | None, host: str, port: int) -> Registered | None:
        """Return the owner's own server at this address."""
        mine = (each for each in self._registered if each.owner == owner)
        return next((each for each in mine if (each.host, each.port) == (host, port)), None)

    def count(self, owner: str) -> int:
        """Return how many servers the owner has registered."""
        return sum(each.owner == owner for each in self._registered)

    def add(self, endpoint: Registered) -> None:
        """Check the server regularly from now on."""
        self._registered[endpoint] = asyncio.ensure_future(self._watch(endpoint))

    async def remove(self, endpoint: Registered) -> None:
        self._registered.pop(endpoint).cancel()
        endpoint.leave("it is no longer registered")
        self._wake()
        await endpoint.client.close()

    async def close(self) -> None:
        for endpoint in list(self._registered):
            await self.remove(endpoint)

    # --- how they are

    def failed(self, endpoint: Registered, error: EndpointDied) -> None:
        """Note that a server died while it was used."""
        endpoint.died(error.message)

    async def change(self, seconds: float) -> None:
        """Wait until a server has become healthy or was removed, at most that long."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), seconds)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def unchecked(self, owner: str) -> list[Registered]:
        """Return the servers that were never checked, so that their models are unknown."""
        return [each for each in self.all(None, owner) if not each.checked.is_set()]

    async def _watch(self, endpoint: Registered) -> None:
        while True:
            try:
                await self.check(endpoint)
            except EndpointError as error:
                endpoint.check_failed(error)
            except Exception as error:  # the answer is not SGLang's
                shown = repr(error) if endpoint.client.is_operators else type(error).__name__
                endpoint.eject(f"it does not answer as SGLang does: {shown}")
            endpoint.checked.set()
            await asyncio.sleep(CHECK_SECONDS)

    async def check(self, endpoint: Registered) -> None:
        """Check the server's health and weights, and note the result. Raises EndpointError."""
        info = await endpoint.client.model_info()
        endpoint.check_passed()
        if not endpoint.reachable:
            if not endpoint.may_return:
                return
            limits = limits_of(await endpoint.client.server_info(), info)
            found = endpoint.base_model or base_model_of(limits, self._base_models.values())
            why = self._mismatch(endpoint, limits, found)
            if why is not None:
                endpoint.problem = why
                return
            endpoint.base_model = found
            endpoint.up(replace(limits, tempered=await are_tempered(endpoint.client)))
        if info.get("weight_version", DEFAULT_VERSION) != endpoint.weight_version:
            version = str(info.get("weight_version"))[:_VERSION_CHARACTERS]
            endpoint.healthy, endpoint.problem = False, f"it has weights {version!r}"
            self.other_weights(endpoint, info)
        elif not endpoint.healthy:
            endpoint.healthy, endpoint.problem = True, ""
            log.info("%s samples %s", endpoint.client.url, endpoint.base_model)
            self.revived(endpoint)
            self._wake()

    def _mismatch(self, endpoint: Registered, limits: Limits, base_model: str | None) -> str | None:
        if base_model not in self._base_models:
            known = ", ".join(self._base_models)
            return f"its model {limits.model_path!r} is not one of this server's ({known}); name it: NAME=URL"
        return mismatch(limits, self._base_models[base_model], endpoint.owner is None)


# --- adding and removing servers


class EndpointKeys:
    """Encrypts the keys of tenants' servers. Without the identity's file, they have to be given again."""

    def __init__(self, data_dir: Path):
        self._file = data_dir / "endpoint_identity"

    @cached_property
    def _identity(self) -> pyrage.x25519.Identity:
        text = read_or_create(self._file, lambda: str(pyrage.x25519.Identity.generate()).encode()).decode()
        try:
            return pyrage.x25519.Identity.from_str(text.strip())
        except pyrage.IdentityError:
            raise OSError(f"{self._file} is damaged; remove it, and the server makes a new one") from None

    def seal(self, key: str) -> str:
        encrypted = pyrage.encrypt(key.encode(), [self._identity.to_public()])
        return base64.b64encode(encrypted).decode()

    def unseal(self, sealed: str) -> str | None:
        """Decrypt a key; None if it was encrypted for another identity, or is damaged."""
        try:
            return pyrage.decrypt(base64.b64decode(sealed, validate=True), [self._identity]).decode()
        except (pyrage.DecryptError, binascii.Error, UnicodeDecodeError):
            return None


MAX_ENDPOINTS = 64  # of a tenant
TENANT_BYTES = 64 << 20
"""The most bytes of answers of a tenant's servers that are held at once."""
_ANSWER_SECONDS = 10.0  # for the first check of a new server

_PLAIN, _SEALED = "api_key", "sealed_key"  # fields of a key: as given, and encrypted
Place = tuple[str, str, int]  # owner, host, port


class Registry:
    """Registers and removes servers. `problems`: why some servers of the ledger are not used."""

    def __init__(self, settings: Settings, ledger: Ledger, endpoints: Endpoints):
        self._settings = settings
        self._ledger = ledger
        self._endpoints = endpoints
        self._allowed = Allowed(settings.sglang_urls, settings.sglang_allow)
        self._keys = EndpointKeys(settings.data_dir)
        self._answer_bytes: WeakValueDictionary[str, AnswerBytes] = WeakValueDictionary()  # by owner
        self.problems: dict[Place, str] = {}

    async def start(self) -> None:
        """Register the servers of the ledger and of the settings."""
        secret = self._settings.sglang_api_key
        key = None if secret is None else secret.get_secret_value()
        for url, base_model in self._settings.sglang_urls.items():
            self._endpoints.add(Registered(Endpoint(url, key), None, base_model))
        await self._seal_keys()
        for row in await self._ledger.read(plugin_rows.all_endpoints):
            if not row.fields.get("is_this"):
                self._take_up(row)

    def _take_up(self, row: Row) -> None:
        problem, key, sealed = None, None, row.fields.get(_SEALED)
        if (row.host, row.port) not in self._allowed:
            problem = "this server's operator does not allow its address any more (--sglang-allow)"
        elif sealed is not None and (key := self._keys.unseal(sealed)) is None:
            problem = "its key cannot be read any more: remove it, and add it again with its key"
        if problem is None:
            self._endpoints.add(self._registered(row.owner, row.host, row.port, row.fields, key))
        else:
            log.warning("%s:%d is not used: %s", row.host, row.port, problem)
            self.problems[row.owner, row.host, row.port] = problem

    async def _seal_keys(self) -> None:
        """Encrypt keys that an earlier version left in the ledger as plain text."""
        for row in await self._ledger.read(plugin_rows.all_endpoints):
            if _PLAIN in row.fields:
                fields = self._sealed(row.fields)
                await self._ledger.write(
                    plugin_rows.replace_endpoint_secret,
                    owner=row.owner,
                    host=row.host,
                    port=row.port,
                    fields=fields,
                )

    def _sealed(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Return the fields for the ledger, with the key encrypted."""
        kept = {name: value for name, value in fields.items() if name != _PLAIN}
        key = fields.get(_PLAIN)
        return kept if key is None else kept | {_SEALED: self._keys.seal(key)}

    def _registered(
        self, owner: str, host: str, port: int, fields: dict[str, Any], key: str | None
    ) -> Registered:
        answer_bytes = self._answer_bytes.setdefault(owner, AnswerBytes(TENANT_BYTES))
        client = Endpoint(url_of(host, port), key, self._allowed, answer_bytes)
        return Registered(client, owner, fields.get("base_model"), fields.get("pool") or "default")

    async def add(self, owner: str, host: str, port: int, fields: dict[str, Any]) -> str | None:
        """Register a tenant's server; return why that is not possible, or None.

        `fields["is_this"]`: it is this server, which is listed but never called.
        """
        if not fields["is_this"]:
            problem = await self._try(owner, host, port, fields)
            if problem is not None:
                return problem
        kept = self._sealed(fields)
        added = await self._ledger.write(plugin_rows.add_endpoint, owner, host, port, kept, MAX_ENDPOINTS)
        if added:
            return None
        if not fields["is_this"] and (endpoint := self._endpoints.find(owner, host, port)) is not None:
            await self._endpoints.remove(endpoint)
        return f"there are {MAX_ENDPOINTS} others already"

    async def _try(self, owner: str, host: str, port: int, fields: dict[str, Any]) -> str | None:
        """Register the server if it turns out to be a suitable one; return the problem otherwise."""
        where = f"{host}:{port}"
        if (host, port) not in self._allowed:
            return f"{where} may not be called by this server: its operator has to allow it (--sglang-allow)"
        if self._endpoints.find(owner, host, port) or self._endpoints.find(None, host, port):
            return f"{where} is registered already"
        if self._endpoints.count(owner) >= MAX_ENDPOINTS:
            return f"there are {MAX_ENDPOINTS} others already, or they are being added"
        endpoint = self._registered(owner, host, port, fields, fields.get(_PLAIN))
        self._endpoints.add(endpoint)
        try:
            await asyncio.wait_for(endpoint.checked.wait(), _ANSWER_SECONDS)
        except TimeoutError:
            endpoint.problem = "it does not answer"
        if endpoint.reachable:
            return None
        problem = endpoint.problem
        await self._endpoints.remove(endpoint)
        return f"{where} is not a usable SGLang server: {problem}"

    async def remove(self, owner: str, host: str, port: int) -> bool:
        """Remove a tenant's server; return whether it was there. Its samples are drawn elsewhere."""
        gone = await self._ledger.write(plugin_rows.remove_endpoint, owner, host, port)
        self.problems.pop((owner, host, port), None)
        endpoint = self._endpoints.find(owner, host, port)
        if endpoint is not None:
            await self._endpoints.remove(endpoint)
        return gone

    def close(self) -> None:
        self._allowed.close()
