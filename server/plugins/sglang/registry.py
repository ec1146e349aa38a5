"""SGLang servers come and go: the operator's at the start, tenants' by request; the ledger keeps these.

Keys of tenants' SGLang servers, encrypted at rest.

The ledger has them as age files (https://age-encryption.org/v1) for an identity that is in the data directory
beside it, in a file that only the server's user can read: a copy of the ledger alone opens nothing.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import pyrage
from sqlalchemy import Row

from ...addresses import Allowed, url_of
from ...files import read_or_create
from ...ledger import plugins as plugin_rows
from ...ledger.ledger import Ledger
from ...settings import Settings
from .endpoint import Endpoint, Room
from .endpoints import Endpoints, Registered


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


log = logging.getLogger("tinsmith.inference")

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
