"""Checks who sent a request, before its body is read: by its key, or by the web page that sends it."""

from __future__ import annotations

import contextlib
import hmac
import logging
from collections.abc import Iterable
from functools import lru_cache
from urllib.parse import urlsplit

from pydantic import SecretStr
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from ...engine import logs
from ..access import SIGNATURE, ApiKeys, Caller, Tokens, UrlSigner
from ..addresses import is_loopback, plain_host
from ..errors import ApiError, Forbidden, InvalidToken, Unauthorized, UnsupportedMediaType
from ..models.admission import Admission
from .errors import api_error_response, error_response

# Answered without a key: probes of load balancers have none.
METRICS_PATH = "/metrics"
OPEN_PATHS = frozenset({"/health", "/api/v1/health", "/api/v1/healthz", "/healthz"})


class Authentication:
    """ASGI middleware: puts the `caller` and its `owner` into a request's state. Before the body is read, it
    answers 401 to unknown callers, and 429 to an owner that sends too many requests."""

    def __init__(
        self,
        app: ASGIApp,
        keys: ApiKeys,
        tokens: Tokens,
        admission: Admission,
        signer: UrlSigner,
        scrape_token: SecretStr | None = None,
    ):
        """`scrape_token`: the only token that opens `/metrics`; None: every key does."""
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
            with contextlib.suppress(ApiError):  # with a key the answer has more
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
        """Return who sent a request: by its key or token, or, without one, by the signature of its URL.
        Raises Unauthorized, or Forbidden."""
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
    """Return the key or token that a request was sent with, or None. An empty header counts as none."""
    key = headers.get("x-api-key", "").strip()
    if not key:
        scheme, _, credentials = headers.get("authorization", "").strip().partition(" ")
        key = credentials.strip() if scheme.lower() == "bearer" else ""
    return key or None


log = logging.getLogger("tinsmith.auth")

_DEFAULT_PORTS = {"http": 80, "https": 443}
_FORM = "application/x-www-form-urlencoded"
_SIMPLE = frozenset({"text/plain", "multipart/form-data", _FORM})
"""The content types that a page can send to another site without asking it first (Fetch standard)."""


class AllowedHosts:
    """Names of this machine, and those that the operator allows: exact ones, `*.example.org`, or `*` for
    any."""

    def __init__(self, names: Iterable[str]):
        lowered = [plain_host(name.strip()) for name in names]
        self._any = "*" in lowered
        self._exact = frozenset(lowered)
        self._below = tuple(name[1:] for name in lowered if name.startswith("*."))

    def listed(self, host: str) -> bool:
        """Return whether the operator has allowed the host."""
        return self._any or host in self._exact or host.endswith(self._below)

    def __contains__(self, host: str) -> bool:
        return self.listed(host) or is_loopback(host) or host.endswith(".localhost")


class BrowserChecks:
    """ASGI middleware: on a server without keys, answers requests of other sites' pages with 403 or 415.

    Such a server listens on loopback alone, but a browser on the same machine can reach loopback too, for any
    page that it shows. A page of another site can post without asking first ("simple" requests of the Fetch
    standard), and a page whose owner lets its name resolve to 127.0.0.1 (DNS rebinding) can even read the
    answers. Three checks keep both out; clients that are not browsers pass them:

    - `Host` names this machine, or a host that the operator allows;
    - `Origin` and `Sec-Fetch-Site`, which browsers send and pages cannot forge, name our own page;
    - a body has a content type that pages cannot send without asking. Only a client that shows no sign of
      being a browser may send `application/x-www-form-urlencoded`, as `curl -d` does.

    A server with keys needs no such checks: pages do not know the keys.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys, hosts: AllowedHosts):
        self._app = app
        self._keys = keys
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._keys.required:
            try:
                self._check(scope["method"], scope.get("scheme", "http"), Headers(scope=scope))
            except ApiError as error:
                log.info("%s %s is refused: %s", scope["method"], scope["path"][:256], error.message)
                answer = error_response(scope["path"], error.status, error.message, error.category)
                await answer(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, method: str, scheme: str, headers: Headers) -> None:
        """Raise Forbidden or UnsupportedMediaType if another site's page may have sent the request."""
        places = [_place(f"{scheme}://{host}") for host in headers.getlist("host")]
        for host, _ in places:
            if host not in self._hosts:
                raise Forbidden(
                    f"Host: {host[:256]!r} is not this machine, and this server has no keys; to allow "
                    "the name, its operator sets TINSMITH_ALLOWED_HOSTS"
                )
        self._check_page(method, places[0] if places else None, headers)
        _check_body(headers)

    def _check_page(self, method: str, own: tuple[str, int | None] | None, headers: Headers) -> None:
        """Raise Forbidden unless the page that sent the request, if a page did, is this server's or an
        allowed host's."""
        origins = headers.getlist("origin")
        for origin in origins:
            host, port = _place(origin)
            is_own = own is not None and port == own[1] and _alike(host, own[0])
            if not (is_own or self._hosts.listed(host)):
                raise Forbidden(
                    f"Origin: pages of {origin[:256]!r} may not use this server, which has no keys; to allow "
                    "them, its operator sets TINSMITH_ALLOWED_HOSTS"
                )
        site = headers.get("sec-fetch-site", "").strip().lower()
        is_visit = method in ("GET", "HEAD") and headers.get("sec-fetch-mode") == "navigate"
        if site in ("cross-site", "same-site") and not (origins or is_visit):
            raise Forbidden(f"Sec-Fetch-Site: {site}: pages of other sites may not use this server")


def _check_body(headers: Headers) -> None:
    """Raise UnsupportedMediaType for a body that another site's page can send without asking first."""
    if headers.get("content-length", "0").strip() == "0" and "transfer-encoding" not in headers:
        return
    kinds = {
        part.partition(";")[0].strip().lower()
        for value in headers.getlist("content-type")
        for part in value.split(",")
    } or {""}
    if "" in kinds:
        raise UnsupportedMediaType("Content-Type: missing; send application/json")
    simple = kinds & _SIMPLE
    if simple and (simple != {_FORM} or _is_browser(headers)):
        raise UnsupportedMediaType(f"Content-Type: {sorted(simple)[0]} is not taken; send application/json")


def _is_browser(headers: Headers) -> bool:
    signs = ("origin", "referer", "sec-fetch-site", "sec-fetch-mode", "sec-fetch-dest")
    return any(name in headers for name in signs) or headers.get("user-agent", "").startswith("Mozilla/")


@lru_cache(maxsize=32)  # nearly all requests have the same few
def _place(origin: str) -> tuple[str, int | None]:
    """Return the host and port of `SCHEME://HOST:PORT`; an empty text and None for anything else."""
    try:
        parts = urlsplit(origin.strip())
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return "", None
    return plain_host(host), port or _DEFAULT_PORTS.get(parts.scheme)


def _alike(one: str, other: str) -> bool:
    """Return whether both name the same host. All names of this machine do."""
    return one == other or (is_loopback(one) and is_loopback(other))
