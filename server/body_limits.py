"""A body that is too long is answered 413 before it is parsed."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import error_response

# The bodies of all other routes describe something: names, paths, metadata.
USUAL_BYTES = 1 << 20
# Prompts: the longest contexts there are, and the tokens whose log-probs are asked for at each place of one.
SAMPLING_BYTES = 16 << 20
_TRAINING = ("/api/v1/forward_backward", "/api/v1/forward")
_SAMPLING = (
    *("/api/v1/asample", "/api/v1/sample"),
    *("/generate", "/v1/completions", "/v1/chat/completions"),
)


def of_training_and_sampling(max_body_bytes: int) -> dict[str, int]:
    """Bytes that the bodies of these routes may have, by path; training may take as much as any body."""
    own = dict.fromkeys(_TRAINING, max_body_bytes)
    return own | dict.fromkeys(_SAMPLING, min(SAMPLING_BYTES, max_body_bytes))


class BodyLimits:
    """ASGI middleware: bodies of at most `usual` bytes, and on some paths of as many as `own` says."""

    def __init__(self, app: ASGIApp, usual: int, own: Mapping[str, int]):
        self._app = app
        self._usual = usual
        self._own = own

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._own.get(scope["path"], self._usual)
        declared = HTTPConnection(scope).headers.get("content-length", "0")
        # At most 18 ASCII digits: str.isdigit takes '²' too, and int() no more than 4300 of them.
        is_number = declared.isascii() and declared.isdigit() and len(declared) <= 18
        if not is_number or int(declared) > limit:
            await _refuse(limit, scope, receive, send)
            return
        seen = 0
        over = False

        async def counted() -> Message:
            nonlocal seen, over
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                over = True
                return {"type": "http.disconnect"}
            return message

        async def guarded(message: Message) -> None:
            if not over:
                await send(message)

        try:
            await self._app(scope, counted, guarded)
        finally:
            if over:
                await _refuse(limit, scope, receive, send)


async def _refuse(limit: int, scope: Scope, receive: Receive, send: Send) -> None:
    message = f"the body is over the limit of {limit} bytes"
    await error_response(scope["path"], 413, message, "user")(scope, receive, send)
