"""Bodies of JSON whose content type does not say so, as `curl -d` sends them."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

_TAKEN_FOR_JSON = (b"", b"application/x-www-form-urlencoded", b"text/plain")
"""What clients send that were given a body and no content type: no route takes a form or plain text."""


class JsonBodies:
    """ASGI middleware: gives a body the content type of JSON where the client's says nothing about it.

    It belongs behind `BrowserChecks`, which refuses what a page of another site may send without keys.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            kinds = [value for name, value in scope["headers"] if name == b"content-type"] or [b""]
            if all(kind.partition(b";")[0].strip().lower() in _TAKEN_FOR_JSON for kind in kinds):
                headers = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
                scope = {**scope, "headers": [*headers, (b"content-type", b"application/json")]}
        await self._app(scope, receive, send)
