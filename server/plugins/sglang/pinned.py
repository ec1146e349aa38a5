"""HTTP to servers that tenants have named: each request goes to an address that was checked for it."""

from __future__ import annotations

import contextlib

import httpx

from ...addresses import Allowed, NotAllowed


class PinnedTransport(httpx.AsyncBaseTransport):
    """Resolves a request's host once, checks the addresses, and connects to the first that takes it.

    A name that leads to an allowed address when it is registered, and to another one later (DNS rebinding),
    is refused then. The `Host` header and the TLS name stay as they were.
    """

    def __init__(self, allowed: Allowed, limits: httpx.Limits):
        self._allowed = allowed
        self._inner = httpx.AsyncHTTPTransport(limits=limits, trust_env=False)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        host, port = request.url.host, request.url.port or (443 if request.url.scheme == "https" else 80)
        try:
            found = await self._allowed.resolve(host, port)
        except NotAllowed as error:
            raise httpx.ConnectError(str(error), request=request) from None
        except (OSError, TimeoutError, ValueError) as error:
            raise httpx.ConnectError(f"the name {host!r} cannot be resolved", request=request) from error
        for each in found[:-1]:
            with contextlib.suppress(httpx.ConnectError, httpx.ConnectTimeout):
                return await self._send(request, host, each)
        return await self._send(request, host, found[-1])

    async def _send(self, request: httpx.Request, host: str, address: str) -> httpx.Response:
        pinned = httpx.Request(
            request.method,
            request.url.copy_with(host=address),
            headers=request.headers,
            stream=request.stream,
            extensions=request.extensions | {"sni_hostname": host},
        )
        return await self._inner.handle_async_request(pinned)

    async def aclose(self) -> None:
        await self._inner.aclose()
