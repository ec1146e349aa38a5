"""Callers of the server: their API keys, and the quotas of their tenants.

A key belongs to an owner. Everything is created with an owner and is invisible to all others. Keys are
given at the start (settings.py), or put into the ledger by `tinsmith keys`. Without any key (possible on
loopback only) every caller is the one owner `local`. Keys are kept and looked up as SHA-256 digests, so
the time of a look-up tells nothing about the keys. A token (tokens.py) stands for the key that it was
exchanged for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from ..ledger import accounts, tenancy
from ..ledger.ledger import Ledger
from ..settings import Settings, parse_keys


@dataclass(frozen=True)
class Quota:
    """What a tenant may have at a time.

    `models`: in the engine or on the way into it. `checkpoint_bytes`: of complete checkpoints.
    `queued_operations`: unanswered operations of training; `waiting_samples`: unanswered samples.
    `queued_bytes`: the bodies of both. `metadata_bytes`: names and metadata of sessions, models and samplers.
    """

    models: int
    checkpoint_bytes: int
    queued_operations: int
    waiting_samples: int
    requests_per_second: float
    metadata_bytes: int
    queued_bytes: int


class Quotas:
    """The quotas of tenants: the settings', and those that `tinsmith keys quota` has set."""

    def __init__(self, settings: Settings):
        self._usual = Quota(
            settings.max_models,
            settings.max_checkpoint_bytes,
            settings.max_queued_operations,
            settings.max_waiting_samples,
            settings.max_requests_per_second,
            settings.max_metadata_bytes,
            settings.max_queued_bytes,
        )
        self._own: dict[str, Quota] = {}

    def of(self, tenant: str) -> Quota:
        return self._own.get(tenant, self._usual)

    def set_own(self, own: Mapping[str, Mapping[str, Any]]) -> None:
        """Set what differs from the settings, by tenant."""
        self._own = {tenant: replace(self._usual, **fields) for tenant, fields in own.items()}

    async def read(self, ledger: Ledger) -> None:
        """Read the ledger's quotas."""
        self.set_own(await ledger.read(tenancy.quotas))


log = logging.getLogger("tinsmith.auth")

READ_EVERY_SECONDS = 1.0
"""How often the ledger is checked for new and revoked keys."""
LOCAL_OWNER = "local"


@dataclass(frozen=True)
class ApiKey:
    """A key. `id` is shown by `tinsmith keys`; keys outside the ledger have part of their digest instead."""

    id: str
    owner: str
    digest: bytes
    note: str
    in_ledger: bool


NO_KEY = ApiKey("", LOCAL_OWNER, b"", "this server requires no key", False)


@dataclass(frozen=True)
class Caller:
    """The sender of a request. `key` None: it came with a signed URL. `token`: sent in place of the key."""

    owner: str
    key: ApiKey | None
    token: str | None = None


class ApiKeys:
    """The keys that this server accepts: those given at its start, and those of the ledger, which `read`
    adds.

    Once there was a key, callers need one, even after all keys were revoked.
    """

    def __init__(self, entries: list[str]):
        """Parse `entries`, each `KEY` or `OWNER=KEY`. Raises ValueError for a key that no client could
        send."""
        note = "given to the server at its start"
        self._given = [
            ApiKey(key.identifier, key.owner, key.digest, note, False) for key in parse_keys(entries)
        ]
        self._required = bool(entries)
        self._index([])

    def _index(self, stored: list[ApiKey]) -> None:
        keys = (*self._given, *stored)
        self._by_digest = {key.digest: key for key in keys}
        self._by_id = {key.id: key for key in keys}
        self._tenants = frozenset(key.owner for key in keys) or frozenset({LOCAL_OWNER})

    @property
    def required(self) -> bool:
        """Whether callers need a key."""
        return self._required

    @property
    def owners(self) -> list[str]:
        return sorted({key.owner for key in self._given}) or [LOCAL_OWNER]

    @property
    def tenants(self) -> frozenset[str]:
        """The owners of all keys."""
        return self._tenants

    def find(self, key: str | None) -> ApiKey | None:
        """Return the key; None if this server does not accept it."""
        if not self._required:
            return NO_KEY
        return self._by_digest.get(accounts.digest(key)) if key else None

    def with_id(self, identifier: str) -> ApiKey | None:
        return self._by_id.get(identifier)

    async def read(self, ledger: Ledger) -> None:
        """Read the ledger's keys."""
        stored = await ledger.read(accounts.all_keys)
        self._required |= bool(stored)
        self._index(
            [
                ApiKey(row.id, row.tenant, row.digest, row.note or "", True)
                for row in stored
                if row.revoked_at is None
            ]
        )


async def read_forever(ledger: Ledger, keys: ApiKeys, quotas: Quotas) -> None:
    """Read regularly what `tinsmith keys` changes while the server runs."""
    while True:
        await asyncio.sleep(READ_EVERY_SECONDS)
        try:
            await keys.read(ledger)
            await quotas.read(ledger)
        except SQLAlchemyError as error:
            log.error("the ledger's keys could not be read; the known ones stay valid: %s", error)
