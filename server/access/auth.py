"""Who is asking: one mechanism in front of every route.

A key belongs to an owner; everything is created with an owner and is invisible to all others. Keys are given
at the start, or are in the ledger, where `tinsmith keys` puts them. Without any (possible on loopback only)
every caller is the one owner `local`. Keys are kept as SHA-256 digests and compared in constant time. A token
(tokens.py) stands for the key that it was exchanged for.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
from dataclasses import dataclass

from sqlalchemy.exc import SQLAlchemyError
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import ApiError, InvalidToken, Unauthorized, error_response
from ..ledger import keys as rows
from ..ledger.ledger import Ledger
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
    """Each entry is `KEY` or `OWNER=KEY`; several keys may share an owner.

    Keys of the ledger are added by `read`. Once there was a key, callers need one, also when all are revoked.
    """

    def __init__(self, entries: list[str]):
        self._given: list[ApiKey] = []
        for entry in entries:
            owner, separator, key = entry.partition("=")
            if not separator or owner.startswith("tml-"):  # keys may end in '='
                owner, key = "", entry
            digest = rows.digest(key)
            identifier = digest.hex()[:12]
            note = "given to the server at its start"
            self._given.append(ApiKey(identifier, owner or f"key-{identifier}", digest, note, False))
        self._stored: list[ApiKey] = []
        self._required = bool(entries)

    @property
    def owners(self) -> list[str]:
        return sorted({key.owner for key in self._given}) or [LOCAL_OWNER]

    @property
    def tenants(self) -> set[str]:
        """Of all keys that there are now."""
        return {key.owner for key in (*self._given, *self._stored)} or {LOCAL_OWNER}

    def find(self, key: str | None) -> ApiKey | None:
        """None if it is no key of this server."""
        if not self._required:
            return NO_KEY
        digest = rows.digest(key or "")
        found = None
        for known in (*self._given, *self._stored):  # all of them: the time taken says nothing
            if hmac.compare_digest(known.digest, digest):
                found = known
        return found

    def with_id(self, identifier: str) -> ApiKey | None:
        return next((key for key in (*self._given, *self._stored) if key.id == identifier), None)

    async def read(self, ledger: Ledger) -> None:
        """Takes up the keys that the ledger has now."""
        stored = await ledger.read(rows.all_keys)
        self._stored = [
            ApiKey(row.id, row.tenant, row.digest, row.note or "", True)
            for row in stored
            if row.revoked_at is None
        ]
        self._required |= bool(stored)


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
            answer = error_response(scope["path"], error.status, error.message, error.category, error.headers)
            await answer(scope, receive, send)
            return
        scope.setdefault("state", {}).update(caller=caller, owner=caller.owner)
        await self._app(scope, receive, send)

    def _caller(self, scope: Scope) -> Caller:
        """By key or token, or, without one, by the URL's signature. Raises Unauthorized, or Forbidden."""
        headers = HTTPConnection(scope).headers
        key = headers.get("x-api-key")
        if key is None and headers.get("authorization", "").lower().startswith("bearer "):
            key = headers["authorization"][7:].strip()
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
