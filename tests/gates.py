"""The server's gate before an application of a test's own."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, cast

from starlette.types import ASGIApp
from tinsmith.server.access import ApiKeys
from tinsmith.server.http.bodies import BodyLimits, budget
from tinsmith.server.http.browser_checks import AllowedHosts, BrowserChecks
from tinsmith.server.http.dependencies import Services
from tinsmith.server.http.gate import Gate
from tinsmith.server.http.monitoring import Metrics


def gate(
    app: ASGIApp, keys: Iterable[str] = (), allowed: Iterable[str] = (), max_bytes: int = 1 << 20
) -> Gate:
    """Return a gate that lets in any number of requests. `allowed`: hosts of pages, without keys."""
    unlimited = cast(Any, SimpleNamespace(request=lambda tenant: None))
    browsers = BrowserChecks(AllowedHosts(allowed))
    limits = BodyLimits(1, {"/": max_bytes}, budget(max_bytes))
    unused = cast(Any, None)
    return Gate(app, ApiKeys([*keys]), unused, unused, browsers, unlimited, limits, Services(), Metrics())
