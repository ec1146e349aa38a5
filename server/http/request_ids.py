"""An id for every request: in the answer's `X-Request-Id`, and in what is logged while it is handled."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...engine import logs

log = logging.getLogger("tinsmith.requests")

_GIVEN = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class RequestIds:
    """ASGI middleware, outside of all others. A proxy or a client may give the id."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        request_id = given if _GIVEN.fullmatch(given) else uuid.uuid4().hex.encode()
        with logs.ids(request_id=request_id.decode()):
            await self._pass_on(scope, receive, send, request_id)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send, request_id: bytes) -> None:
        began, status = time.perf_counter(), 0

        async def with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
            await send(message)

        try:
            await self._app(scope, receive, with_id)
        finally:
            level = logging.WARNING if status >= 500 else logging.DEBUG
            if log.isEnabledFor(level):
                seconds = time.perf_counter() - began
                log.log(level, "%s %s: %d in %.3f s", scope["method"], scope["path"], status, seconds)
