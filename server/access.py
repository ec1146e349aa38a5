"""Access to the server: API keys, tokens and signed URLs in their place, and the quotas of tenants.

A key belongs to an owner. Everything is created with an owner and is invisible to all others. Keys are
given at the start (settings.py), or put into the ledger by `tinsmith keys`. Without any key (possible on
loopback only) every caller is the one owner `local`. Keys are kept and looked up as SHA-256 digests, so
the time of a look-up tells nothing about the keys.

A token (JSON Web Token, RFC 7519) names the key that it was exchanged for, and is valid until it expires
or that key is revoked.

A signed URL needs no key. It is valid for some time and one path, in the name of the tenant that
requested it. Its signature covers the method, the path, the tenant, the save and the time of expiry. The
route behind it still checks whether that tenant may have what it names. Both are signed with HMAC-SHA256.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl, quote, urlencode

import jwt
import orjson
from sqlalchemy.exc import SQLAlchemyError

from .errors import Forbidden
from .files import read_or_create
from .ledger import accounts, tenancy
from .ledger.ledger import Ledger
from .settings import Settings, parse_keys

TenantClass = Literal["admin", "own_quota", "standard"]
"""Tenants told apart without their names: those of `--admin`, those with a quota of their own, all others."""


@dataclass(frozen=True)
class Quota:
    """Limits of a tenant.

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
    tenant_class: TenantClass = "standard"


class Quotas(dict[str, Quota]):
    """The quotas by tenant: the settings', and those that `tinsmith keys quota` has set."""

    def __init__(self, settings: Settings):
        super().__init__()
        self._admins = frozenset(settings.admin)
        self._usual = Quota(
            settings.max_models,
            settings.max_checkpoint_bytes,
            settings.max_queued_operations,
            settings.max_waiting_samples,
            settings.max_requests_per_second,
            settings.max_metadata_bytes,
            settings.max_queued_bytes,
        )
        self._own: Mapping[str, Mapping[str, Any]] = {}

    def __missing__(self, tenant: str) -> Quota:
        quota = replace(self._usual, tenant_class="admin") if tenant in self._admins else self._usual
        self[tenant] = quota
        return quota

    def set_own(self, own: Mapping[str, Mapping[str, Any]]) -> None:
        """Set the quotas that differ from the settings, by tenant."""
        if own == self._own:
            return
        self._own = own
        self.clear()
        for tenant, fields in own.items():
            tenant_class: TenantClass = "admin" if tenant in self._admins else "own_quota"
            self[tenant] = replace(self._usual, **fields, tenant_class=tenant_class)

    async def read(self, ledger: Ledger) -> None:
        """Read the ledger's quotas."""
        self.set_own(await ledger.read(tenancy.quotas))


log = logging.getLogger("tinsmith.auth")

READ_EVERY_SECONDS = 1.0
"""The ledger is checked for new and revoked keys this often."""
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


ANYBODY = Caller(LOCAL_OWNER, NO_KEY)


class ApiKeys:
    """The keys that this server accepts: those given at its start, and those of the ledger, which `read`
    adds.

    Once there was a key, callers need one, even after all keys were revoked.
    """

    def __init__(self, entries: list[str]):
        """Parse `entries`, each `KEY` or `OWNER=KEY`. Raises ValueError for a key that no client can send."""
        note = "given to the server at its start"
        self._given = [
            ApiKey(key.identifier, key.owner, key.digest, note, False) for key in parse_keys(entries)
        ]
        self.required = bool(entries)
        """Whether callers need a key."""
        self._index([])

    def _index(self, stored: list[ApiKey]) -> None:
        keys = (*self._given, *stored)
        self.callers = {key.digest: Caller(key.owner, key) for key in keys}
        self._by_id = {key.id: key for key in keys}
        self._tenants = frozenset(key.owner for key in keys) or frozenset({LOCAL_OWNER})

    @property
    def owners(self) -> list[str]:
        return sorted({key.owner for key in self._given}) or [LOCAL_OWNER]

    @property
    def tenants(self) -> frozenset[str]:
        """The owners of all keys."""
        return self._tenants

    def with_id(self, identifier: str) -> ApiKey | None:
        return self._by_id.get(identifier)

    async def read(self, ledger: Ledger) -> None:
        """Read the ledger's keys."""
        stored = await ledger.read(accounts.all_keys)
        self.required |= bool(stored)
        self._index(
            [
                ApiKey(row.id, row.tenant, row.digest, row.note or "", True)
                for row in stored
                if row.revoked_at is None
            ]
        )


async def read_forever(ledger: Ledger, keys: ApiKeys, quotas: Quotas) -> None:
    """Read keys and quotas regularly, which `tinsmith keys` may change while the server runs."""
    while True:
        await asyncio.sleep(READ_EVERY_SECONDS)
        try:
            await keys.read(ledger)
            await quotas.read(ledger)
        except SQLAlchemyError as error:
            log.error("the ledger's keys could not be read; the known ones stay valid: %s", error)


# --- signed URLs and tokens

SIGNATURE = "signature"
_SECRET_BYTES = 32
_PARAMETERS = ("tenant", "save", "expires", SIGNATURE)


class UrlSigner:
    """Signs URLs and checks them.

    The secret is a file in the data directory that only the server's user can read. Without it, earlier URLs
    are invalid.
    """

    def __init__(self, data_dir: Path, seconds: float, clock: Callable[[], float] = time.time):
        self._file = data_dir / "url_secret"
        self._seconds = seconds
        self._clock = clock

    @cached_property
    def _secret(self) -> bytes:
        secret = read_or_create(self._file, lambda: secrets.token_bytes(_SECRET_BYTES))
        if len(secret) != _SECRET_BYTES:
            raise OSError(f"{self._file} is damaged; remove it, and the server makes a new one")
        return secret

    def _signature(self, method: str, path: str, tenant: str, save: str, expires: str) -> str:
        text = orjson.dumps([method, path, tenant, save, expires])
        return hmac.new(self._secret, text, hashlib.sha256).hexdigest()

    def derived_secret(self, purpose: str) -> bytes:
        """Return 32 bytes for another use, from which this secret cannot be derived."""
        return hmac.new(self._secret, f"tinsmith {purpose}".encode(), hashlib.sha256).digest()

    def expiry(self) -> int:
        """Return when a URL signed now expires, in seconds since 1970."""
        return int(self._clock() + self._seconds)

    def sign(self, path: str, tenant: str, save: str, expires: int) -> str:
        """Return the path with its query, for GET. `save` distinguishes checkpoints of the same name."""
        values = (tenant, save, str(expires), self._signature("GET", path, tenant, save, str(expires)))
        return f"{quote(path, safe='/:@')}?{urlencode(list(zip(_PARAMETERS, values, strict=True)))}"

    def tenant_of(self, method: str, path: str, query: str) -> str:
        """Return a URL's tenant. Raises Forbidden if it was altered, has expired or is another server's."""
        pairs = parse_qsl(query, keep_blank_values=True)
        given = dict(pairs)
        if sorted(name for name, _ in pairs) != sorted(_PARAMETERS):
            raise Forbidden("this URL's parameters are not those that it was signed with")
        tenant, save, expires, signature = (given[name] for name in _PARAMETERS)
        expected = self._signature(method, path, tenant, save, expires)
        if not hmac.compare_digest(expected.encode(), signature.encode()):
            raise Forbidden("this URL's signature is not of this method, path and expiry")
        if self._clock() >= int(expires):
            raise Forbidden("this URL has expired; ask for a new one")
        return tenant


_ALGORITHM = "HS256"
# The SDK reads its user from a token only if the issuer has this name.
_ISSUER = "passport-tinsmith"
_REQUIRED = ["iss", "sub", "iat", "exp", "key", "org_id"]


def user_urn(owner: str) -> str:
    """Return the name of a key's owner in answers."""
    return f"tml:organization_user:{owner}"


@dataclass(frozen=True)
class Claims:
    """A token's owner, and the id of the key behind it."""

    owner: str
    key_id: str


class Tokens:
    """Issues tokens and checks them. The secret is derived from that of signed URLs."""

    def __init__(self, signer: UrlSigner, seconds: float, clock: Callable[[], float] = time.time):
        self._signer = signer
        self._seconds = seconds
        self._clock = clock

    @cached_property
    def _secret(self) -> bytes:
        return self._signer.derived_secret("tokens")

    def issue(self, claims: Claims) -> str:
        now = int(self._clock())
        payload = {
            "iss": _ISSUER,
            "sub": user_urn(claims.owner),
            "org_id": claims.owner,
            "key": claims.key_id,
            "iat": now,
            "exp": now + int(self._seconds),
        }
        return jwt.encode(payload, self._secret, _ALGORITHM)

    def claims(self, token: str) -> Claims | None:
        """Return a token's claims; None if it was altered, has expired or is another server's."""
        try:
            payload = jwt.decode(
                token,
                self._secret,
                algorithms=[_ALGORITHM],
                issuer=_ISSUER,
                options={"require": _REQUIRED, "verify_exp": False, "verify_iat": False},
            )
        except jwt.InvalidTokenError:
            return None
        if self._clock() >= payload["exp"]:  # by our clock, not PyJWT's
            return None
        return Claims(payload["org_id"], payload["key"])
