"""Checks which web page sent a request, on a server without keys."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import lru_cache
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

from ..addresses import is_loopback, plain_host
from ..errors import ApiError, Forbidden, UnsupportedMediaType

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
    """On a server without keys, refuses requests of other sites' pages.

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

    def __init__(self, hosts: AllowedHosts):
        self._hosts = hosts

    def check(self, scope: Scope) -> None:
        """Raise Forbidden or UnsupportedMediaType if another site's page may have sent the request."""
        try:
            self._check(scope["method"], scope.get("scheme", "http"), Headers(scope=scope))
        except ApiError as error:
            log.info("%s %s is refused: %s", scope["method"], scope["path"][:256], error.message)
            raise

    def _check(self, method: str, scheme: str, headers: Headers) -> None:
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
