"""Authentication in front of every route: by API key, by token, or by a URL's signature."""

from __future__ import annotations

import contextlib
import hmac

from pydantic import SecretStr
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from ...engine import logs
from ..access.keys import ApiKeys, Caller
from ..access.tokens import SIGNATURE, Tokens, UrlSigner
from ..errors import ApiError, InvalidToken, Unauthorized
from ..models.admission import Admission
from .errors import api_error_response

# Answered without a key: probes of load balancers have none.
METRICS_PATH = "/metrics"
OPEN_PATHS = frozenset({"/health", "/api/v1/health", "/api/v1/healthz", "/healthz"})


class Authentication:
    """ASGI middleware: puts `caller` and its `owner` into the request's state, or answers 401, or 429 to an
    owner that asks too often, before the body is read."""

    def __init__(
        self,
        app: ASGIApp,
        keys: ApiKeys,
        tokens: Tokens,
        admission: Admission,
        signer: UrlSigner,
        scrape_token: SecretStr | None = None,
    ):
        """`scrape_token`: what alone opens `/metrics`; None: every key does."""
        self._app = app
        self._keys = keys
        self._tokens = tokens
        self._admission = admission
        self._signer = signer
        self._scrape_token = scrape_token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"] in OPEN_PATHS:
            with contextlib.suppress(ApiError):  # whoever has a key is told more
                scope.setdefault("state", {})["owner"] = self._caller(scope).owner
            await self._app(scope, receive, send)
            return
        if scope["path"] == METRICS_PATH and self._scrape_token is not None:
            sent = _sent_key(HTTPConnection(scope).headers) or ""
            if hmac.compare_digest(sent.encode(), self._scrape_token.get_secret_value().encode()):
                await self._app(scope, receive, send)
                return
            error = Unauthorized("/metrics takes the token of --metrics-token alone, as a bearer token")
            await api_error_response(scope["path"], error)(scope, receive, send)
            return
        try:
            caller = self._caller(scope)
            self._admission.request(caller.owner)
        except ApiError as refused:
            await api_error_response(scope["path"], refused)(scope, receive, send)
            return
        scope.setdefault("state", {}).update(caller=caller, owner=caller.owner)
        logs.add_ids(tenant=caller.owner)
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
