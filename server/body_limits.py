"""How long bodies may be, by route."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from .auth import BodyLimit


class BodyLimits:
    """ASGI middleware: `usual` bytes, and on some paths those of `own`."""

    def __init__(self, app: ASGIApp, usual: int, own: dict[str, int]):
        self._usual = BodyLimit(app, usual)
        self._own = {path: BodyLimit(app, limit) for path, limit in own.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._own.get(scope.get("path", ""), self._usual)(scope, receive, send)
