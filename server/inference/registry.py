"""SGLang servers come and go: the operator's at the start, tenants' by request; the ledger keeps these."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from ..ledger import inference as rows
from ..ledger.ledger import Ledger
from ..settings import Settings
from .addresses import Allowed, url_of
from .endpoint import Endpoint
from .endpoints import Endpoints, Registered

log = logging.getLogger("tinsmith.inference")

MAX_ENDPOINTS = 64  # of a tenant
_ANSWER_SECONDS = 10.0  # of one that is added, until it says what it is


class Registry:
    def __init__(self, settings: Settings, ledger: Ledger, endpoints: Endpoints):
        self._settings = settings
        self._ledger = ledger
        self._endpoints = endpoints
        self._allowed = Allowed(settings.sglang_urls, settings.sglang_allow)

    async def start(self) -> None:
        """All that there were, and those of the settings."""
        secret = self._settings.sglang_api_key
        key = None if secret is None else secret.get_secret_value()
        for url, base_model in self._settings.sglang_urls.items():
            self._endpoints.add(Registered(Endpoint(url, key), None, base_model))
        for row in await self._ledger.read(rows.all_endpoints):
            if row.fields.get("is_this"):
                continue
            if (row.host, row.port) in self._allowed:
                self._endpoints.add(_registered(row.owner, row.host, row.port, row.fields))
            else:
                log.warning("%s:%d is not asked: --sglang-allow does not have it", row.host, row.port)

    async def add(self, owner: str, host: str, port: int, fields: dict[str, Any]) -> str | None:
        """Why it is not there then, or None. `fields["is_this"]`: it is this server, and is not asked."""
        if not fields["is_this"]:
            problem = await self._try(owner, host, port, fields)
            if problem is not None:
                return problem
        added = await self._ledger.write(
            lambda connection: rows.add(connection, owner, host, port, fields, MAX_ENDPOINTS)
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
        endpoint = _registered(owner, host, port, fields)
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
        gone = await self._ledger.write(lambda connection: rows.remove(connection, owner, host, port))
        endpoint = self._endpoints.find(owner, host, port)
        if endpoint is not None:
            await self._endpoints.remove(endpoint)
        return gone


def _registered(owner: str, host: str, port: int, fields: dict[str, Any]) -> Registered:
    client = Endpoint(url_of(host, port), fields.get("api_key"))
    return Registered(client, owner, fields.get("base_model"), fields.get("pool") or "default")
