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
from functools import cached_property, partial
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
    Endpoint,
    EndpointBusy,
    EndpointDied,
    EndpointError,
    EndpointSilent,
    Limits,
    Room,
    are_tempered,
    base_model_of,
    limits_of,
    mismatch,
)

log = logging.getLogger("tinsmith.inference")

CHECK_SECONDS = 2.0
DEFAULT_VERSION = "default"
"""What SGLang calls the weights that it was started with."""
_FAILED_CHECKS = 3  # in a row: a busy machine is no dead server
_VERSION_CHARACTERS = 128
_FLAPPING_SECONDS = 600.0
_OUT_SECONDS = (0.0, 2.0, 5.0, 15.0, 60.0)  # after the first death within that time, the second, ...

T = TypeVar("T")


@dataclass(eq=False)
class Registered:
    """One server. `owner` None: the operator's. `base_model` None: not known yet. `life` grows by one each
    time that it comes up: what had been loaded may be gone. `weights` is the key of those that it has been
    given in place of its base model's, `weight_version` what it calls them."""

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
    problem: str = "it has not been asked yet"
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
        """A sample runs there, and its weights stay what they are."""
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
        """Our samples there have ended, and others wait."""
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
        """What is asked of it. Raises EndpointDied as soon as it is known to be down."""
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
        """What it has, or is to have before it is used again."""
        self.weights, self.weight_version = weights, weight_version

    def eject(self, why: str) -> None:
        """Out of use until the next good check; what it samples is lost."""
        if self.reachable:
            log.warning("%s is out of use: %s", self.client.url, why)
        self.leave(why)

    def leave(self, why: str) -> None:
        self.healthy = self.reachable = False
        self.problem = why
        self._down.set()

    def died(self, why: str) -> None:
        """As `eject`, and for longer if it was so lately."""
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
        """One that hangs up is not what it was; one that is slow is asked a few times more."""
        self._failed_checks += 1
        is_slow = isinstance(error, (EndpointSilent, EndpointBusy))
        if not self.reachable:
            self.problem = error.message
        elif not is_slow or self._failed_checks >= _FAILED_CHECKS:
            self.died(error.message)

    def check_passed(self) -> None:
        self._failed_checks = 0


class Endpoints:
    """The SGLang servers that are registered, and their health.

    Events: `revived(endpoint)` when one is healthy, or healthy again with nothing that it was given in an
    earlier life; `other_weights(endpoint, info)`, at every check, for one that fits and has other weights
    than it is to have, with what it says of its model.
    """

    def __init__(self, base_models: dict[str, BaseModel]):
        self._base_models = base_models
        self._registered: dict[Registered, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self.revived: Event[[Registered]] = Event()
        self.other_weights: Event[[Registered, dict[str, Any]]] = Event()

    # --- which there are

    def all(
        self,
        base_model: str | None = None,
        owner: str | None = None,
        pools: Iterable[str] | None = None,
    ) -> list[Registered]:
        """The operator's and the owner's, of a base model (None: any), of some pools (None: all)."""
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
        """Those that are healthy; the one with the fewest samples first."""
        healthy = [each for each in self.all(base_model, owner, pools) if each.healthy]
        return sorted(healthy, key=lambda endpoint: endpoint.running)

    def everybody(self) -> list[Registered]:
        """The operator's and all tenants'."""
        return list(self._registered)

    def find(self, owner: str | None, host: str, port: int) -> Registered | None:
        """The owner's own."""
        mine = (each for each in self._registered if each.owner == owner)
        return next((each for each in mine if (each.host, each.port) == (host, port)), None)

    def count(self, owner: str) -> int:
        """How many are the owner's own."""
        return sum(each.owner == owner for each in self._registered)

    def add(self, endpoint: Registered) -> None:
        """It is asked from now on."""
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
        """Whoever sees one die says so."""
        endpoint.died(error.message)

    async def change(self, seconds: float) -> None:
        """Waits until one has become healthy or was removed, no longer than that."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), seconds)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def unchecked(self, owner: str) -> list[Registered]:
        """Those that have not been asked yet: what they serve is not known."""
        return [each for each in self.all(None, owner) if not each.checked.is_set()]

    async def _watch(self, endpoint: Registered) -> None:
        while True:
            try:
                await self.check(endpoint)
            except EndpointError as error:
                endpoint.check_failed(error)
            except Exception as error:  # it says what no SGLang says
                shown = repr(error) if endpoint.client.is_operators else type(error).__name__
                endpoint.eject(f"it does not answer as SGLang does: {shown}")
            endpoint.checked.set()
            await asyncio.sleep(CHECK_SECONDS)

    async def check(self, endpoint: Registered) -> None:
        """Asks it how it is, and says so in `endpoint`. Raises EndpointError."""
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
            return f"its model {limits.model_path!r} is none of this server's ({known}); name it: NAME=URL"
        return mismatch(limits, self._base_models[base_model], endpoint.owner is None)


# --- adding and removing servers


class EndpointKeys:
    """Without the identity's file, all keys that were sealed with it have to be given again."""

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
        """None for one that was sealed for another identity, or is damaged."""
        try:
            return pyrage.decrypt(base64.b64decode(sealed, validate=True), [self._identity]).decode()
        except (pyrage.DecryptError, binascii.Error, UnicodeDecodeError):
            return None


MAX_ENDPOINTS = 64  # of a tenant
TENANT_BYTES = 64 << 20
"""Of answers of a tenant's servers that are held at once."""
_ANSWER_SECONDS = 10.0  # of one that is added, until it says what it is

_PLAIN, _SEALED = "api_key", "sealed_key"  # fields of a key: as it is given, and as it is kept
Place = tuple[str, str, int]  # owner, host, port


class Registry:
    """`problems`: why some that the ledger has are not asked."""

    def __init__(self, settings: Settings, ledger: Ledger, endpoints: Endpoints):
        self._settings = settings
        self._ledger = ledger
        self._endpoints = endpoints
        self._allowed = Allowed(settings.sglang_urls, settings.sglang_allow)
        self._keys = EndpointKeys(settings.data_dir)
        self._rooms: WeakValueDictionary[str, Room] = WeakValueDictionary()  # by owner
        self.problems: dict[Place, str] = {}

    async def start(self) -> None:
        """All that there were, and those of the settings."""
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
            log.warning("%s:%d is not asked: %s", row.host, row.port, problem)
            self.problems[row.owner, row.host, row.port] = problem

    async def _seal_keys(self) -> None:
        """Encrypts keys that an earlier version has left in the ledger as they are."""
        for row in await self._ledger.read(plugin_rows.all_endpoints):
            if _PLAIN in row.fields:
                fields = self._sealed(row.fields)
                await self._ledger.write(
                    partial(
                        plugin_rows.replace_endpoint_secret,
                        owner=row.owner,
                        host=row.host,
                        port=row.port,
                        fields=fields,
                    )
                )

    def _sealed(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The fields as the ledger has them: with the key encrypted."""
        kept = {name: value for name, value in fields.items() if name != _PLAIN}
        key = fields.get(_PLAIN)
        return kept if key is None else kept | {_SEALED: self._keys.seal(key)}

    def _registered(
        self, owner: str, host: str, port: int, fields: dict[str, Any], key: str | None
    ) -> Registered:
        room = self._rooms.setdefault(owner, Room(TENANT_BYTES))
        client = Endpoint(url_of(host, port), key, self._allowed, room)
        return Registered(client, owner, fields.get("base_model"), fields.get("pool") or "default")

    async def add(self, owner: str, host: str, port: int, fields: dict[str, Any]) -> str | None:
        """Why it is not there then, or None. `fields["is_this"]`: it is this server, and is not asked."""
        if not fields["is_this"]:
            problem = await self._try(owner, host, port, fields)
            if problem is not None:
                return problem
        kept = self._sealed(fields)
        added = await self._ledger.write(
            lambda connection: plugin_rows.add_endpoint(connection, owner, host, port, kept, MAX_ENDPOINTS)
        )
        if added:
            return None
        if not fields["is_this"] and (endpoint := self._endpoints.find(owner, host, port)) is not None:
            await self._endpoints.remove(endpoint)
        return f"{MAX_ENDPOINTS} others are there"

    async def _try(self, owner: str, host: str, port: int, fields: dict[str, Any]) -> str | None:
        """Registers it if it is what it should be."""
        where = f"{host}:{port}"
        if (host, port) not in self._allowed:
            return f"{where} may not be asked by this server: its operator has to allow it (--sglang-allow)"
        if self._endpoints.find(owner, host, port) or self._endpoints.find(None, host, port):
            return f"{where} is there already"
        if self._endpoints.count(owner) >= MAX_ENDPOINTS:
            return f"{MAX_ENDPOINTS} others are there, or are being added"
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
        return f"{where} is no SGLang server to sample on: {problem}"

    async def remove(self, owner: str, host: str, port: int) -> bool:
        """Whether it was there. What it samples goes elsewhere."""
        gone = await self._ledger.write(
            lambda connection: plugin_rows.remove_endpoint(connection, owner, host, port)
        )
        self.problems.pop((owner, host, port), None)
        endpoint = self._endpoints.find(owner, host, port)
        if endpoint is not None:
            await self._endpoints.remove(endpoint)
        return gone

    def close(self) -> None:
        self._allowed.close()
