"""Who is asking: one mechanism in front of every route.

A key belongs to an owner; everything is created with an owner and is invisible to all others. Keys are given
at the start (given_keys.py), or are in the ledger, where `tinsmith keys` puts them. Without any (possible on
loopback only) every caller is the one owner `local`. Keys are kept and looked up as SHA-256 digests, so the
time that a look-up takes tells nothing about the keys. A token (tokens.py) stands for the key that it was
exchanged for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass

from sqlalchemy.exc import SQLAlchemyError
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import ApiError, InvalidToken, Unauthorized, api_error_response
from ..ledger import keys as rows
from ..ledger.ledger import Ledger
from . import given_keys
from .admission import Admission
from .quotas import Quotas
from .signed_urls import SIGNATURE, UrlSigner
from .tokens import Tokens

log = logging.getLogger("tinsmith.auth")

READ_EVERY_SECONDS = 1.0
"""How often the ledger is asked for keys that were made or revoked."""
LOCAL_OWNER = "local"
# Answered without a key: probes of load balancers have none.
OPEN_PATHS = frozenset({"/health", "/api/v1/health", "/api/v1/healthz", "/healthz"})


@dataclass(frozen=True)
class ApiKey:
    """`id`: that by which `tinsmith keys` lists it; of a key outside the ledger a part of its digest."""

    id: str
    owner: str
    digest: bytes
    note: str
    in_ledger: bool


NO_KEY = ApiKey("", LOCAL_OWNER, b"", "this server asks for no key", False)


@dataclass(frozen=True)
class Caller:
    """`key`: with which the request came; None: with a signed URL. `token`: that it came with for the key."""

    owner: str
    key: ApiKey | None
    token: str | None = None


class ApiKeys:
    """The keys that open this server: those given at its start, and those of the ledger, which `read` adds.

    Once there was a key, callers need one, even after all keys have been revoked.
    """

    def __init__(self, entries: list[str]):
        """`entries`: each `KEY` or `OWNER=KEY`. Raises ValueError for a key that no client could send."""
        note = "given to the server at its start"
        self._given = [
            ApiKey(key.identifier, key.owner, key.digest, note, False) for key in given_keys.parse(entries)
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
        """The owners of all keys that there are now."""
        return self._tenants

    def find(self, key: str | None) -> ApiKey | None:
        """Return None for what is no key of this server."""
        if not self._required:
            return NO_KEY
        return self._by_digest.get(rows.digest(key)) if key else None

    def with_id(self, identifier: str) -> ApiKey | None:
        return self._by_id.get(identifier)

    async def read(self, ledger: Ledger) -> None:
        """Take up the keys that the ledger has now."""
        stored = await ledger.read(rows.all_keys)
        self._required |= bool(stored)
        self._index(
            [
                ApiKey(row.id, row.tenant, row.digest, row.note or "", True)
                for row in stored
                if row.revoked_at is None
            ]
        )


async def read_forever(ledger: Ledger, keys: ApiKeys, quotas: Quotas) -> None:
    """Takes up what `tinsmith keys` does beside a running server."""
    while True:
        await asyncio.sleep(READ_EVERY_SECONDS)
        try:
            await keys.read(ledger)
            await quotas.read(ledger)
        except SQLAlchemyError as error:
            log.error("the ledger's keys could not be read; those known before stay: %s", error)


class Authentication:
    """ASGI middleware: puts `caller` and its `owner` into the request's state, or answers 401, or 429 to an
    owner that asks too often, before the body is read."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, tokens: Tokens, admission: Admission, signer: UrlSigner):
        self._app = app
        self._keys = keys
        self._tokens = tokens
        self._admission = admission
        self._signer = signer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"] in OPEN_PATHS:
            with contextlib.suppress(ApiError):  # whoever has a key is told more
                scope.setdefault("state", {})["owner"] = self._caller(scope).owner
            await self._app(scope, receive, send)
            return
        try:
            caller = self._caller(scope)
            self._admission.request(caller.owner)
        except ApiError as error:
            await api_error_response(scope["path"], error)(scope, receive, send)
            return
        scope.setdefault("state", {}).update(caller=caller, owner=caller.owner)
        await self._app(scope, receive, send)

    def _caller(self, scope: Scope) -> Caller:
        """By key or token, or, without one, by the URL's signature. Raises Unauthorized, or Forbidden."""
        key = _sent_key(HTTPConnection(scope).headers)
        query = scope["query_string"].decode("latin-1")
        if key is None and f"{SIGNATURE}=" in query:
            return Caller(self._signer.tenant_of(scope["method"], scope["path"], query), None)
        found = self._keys.find(key)
        if found is not None:
            return Caller(found.owner, found)
        if key is None:
            raise Unauthorized("missing API key: send it as X-API-Key (TINKER_API_KEY for the SDK)")
        if key.startswith("eyJ"):  # as the header of every JSON Web Token
            return self._of_token(key)
        raise Unauthorized("invalid API key: this server does not know it")

    def _of_token(self, token: str) -> Caller:
        claims = self._tokens.claims(token)
        if claims is None:
            raise InvalidToken("invalid token: it has expired, or this server did not make it")
        key = self._keys.with_id(claims.key_id)
        if key is None or key.owner != claims.owner:
            raise InvalidToken("invalid token: the key that it was made for is not valid any more")
        return Caller(key.owner, key, token)


def _sent_key(headers: Headers) -> str | None:
    """The key or token that a request was sent with. An empty header says nothing."""
    key = headers.get("x-api-key", "").strip()
    if not key:
        scheme, _, credentials = headers.get("authorization", "").strip().partition(" ")
        key = credentials.strip() if scheme.lower() == "bearer" else ""
    return key or None
