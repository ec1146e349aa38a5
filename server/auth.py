"""Who is asking: one mechanism in front of every route.

A key belongs to an owner; everything is created with an owner and is invisible to all others. Keys are given
at the start, or are in the ledger, where `tinsmith keys` puts them. Without any (possible on loopback only)
every caller is the one owner `local`. Keys are kept as SHA-256 digests and compared in constant time.
"""

from __future__ import annotations

import asyncio
import hmac
import logging

from sqlalchemy.exc import SQLAlchemyError
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from .admission import Admission
from .errors import ApiError, Unauthorized, error_response
from .ledger import keys as rows
from .ledger.ledger import Ledger
from .quotas import Quotas
from .signed_urls import SIGNATURE, UrlSigner

log = logging.getLogger("tinsmith.auth")

READ_EVERY_SECONDS = 1.0
"""How often the ledger is asked for keys that were made or revoked."""
LOCAL_OWNER = "local"
# Answered without a key: probes of load balancers have none.
OPEN_PATHS = frozenset({"/health", "/api/v1/health", "/api/v1/healthz", "/healthz"})


class ApiKeys:
    """Maps keys to owners. Each entry is `KEY` or `OWNER=KEY`; several keys may share an owner.

    Keys of the ledger are added by `read`. Once there was a key, callers need one, also when all are revoked.
    """

    def __init__(self, entries: list[str]):
        self._owners: list[tuple[bytes, str]] = []
        for entry in entries:
            owner, separator, key = entry.partition("=")
            if not separator or owner.startswith("tml-"):  # keys may end in '='
                owner, key = "", entry
            digest = rows.digest(key)
            self._owners.append((digest, owner or f"key-{digest.hex()[:12]}"))
        self._stored: list[tuple[bytes, str]] = []
        self._required = bool(entries)

    @property
    def owners(self) -> list[str]:
        return sorted({owner for _digest, owner in self._owners}) or [LOCAL_OWNER]

    def owner_of(self, key: str | None) -> str | None:
        """The owner of a key; None if it is no key of this server."""
        if not self._required:
            return LOCAL_OWNER
        digest = rows.digest(key or "")
        found = None
        for known, owner in (*self._owners, *self._stored):  # all of them: the time taken says nothing
            if hmac.compare_digest(known, digest):
                found = owner
        return found

    async def read(self, ledger: Ledger) -> None:
        """Takes up the keys that the ledger has now."""
        stored = await ledger.read(rows.all_keys)
        self._stored = [(row.digest, row.tenant) for row in stored if row.revoked_at is None]
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
    """ASGI middleware: puts `owner` into the request's state, or answers 401, or 429 to an owner that asks
    too often, before the body is read."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, admission: Admission, signer: UrlSigner):
        self._app = app
        self._keys = keys
        self._admission = admission
        self._signer = signer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        try:
            owner = self._owner(scope)
            self._admission.request(owner)
        except ApiError as error:
            answer = error_response(scope["path"], error.status, error.message, error.category, error.headers)
            await answer(scope, receive, send)
            return
        scope.setdefault("state", {})["owner"] = owner
        await self._app(scope, receive, send)

    def _owner(self, scope: Scope) -> str:
        """By key, or, without one, by the URL's signature. Raises Unauthorized, or Forbidden."""
        headers = HTTPConnection(scope).headers
        key = headers.get("x-api-key")
        if key is None and headers.get("authorization", "").lower().startswith("bearer "):
            key = headers["authorization"][7:].strip()
        query = scope["query_string"].decode("latin-1")
        if key is None and f"{SIGNATURE}=" in query:
            return self._signer.tenant_of(scope["method"], scope["path"], query)
        owner = self._keys.owner_of(key)
        if owner is None:
            raise Unauthorized(
                "missing API key: send it as X-API-Key (TINKER_API_KEY for the SDK)"
                if key is None
                else "invalid API key: this server does not know it"
            )
        return owner


class BodyLimit:
    """ASGI middleware: a body over `max_bytes` is answered 413 before it is parsed."""

    def __init__(self, app: ASGIApp, max_bytes: int):
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = HTTPConnection(scope).headers.get("content-length", "0")
        # At most 18 ASCII digits: str.isdigit takes '²' too, and int() no more than 4300 of them.
        is_number = declared.isascii() and declared.isdigit() and len(declared) <= 18
        if not is_number or int(declared) > self._max_bytes:
            await self._refuse(scope, receive, send)
            return
        seen = 0
        over = False

        async def counted() -> dict:
            nonlocal seen, over
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._max_bytes:
                over = True
                return {"type": "http.disconnect"}
            return dict(message)

        async def guarded(message) -> None:
            if not over:
                await send(message)

        try:
            await self._app(scope, counted, guarded)
        finally:
            if over:
                await self._refuse(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = f"the body is over the limit of {self._max_bytes} bytes"
        await error_response(scope["path"], 413, message, "user")(scope, receive, send)
