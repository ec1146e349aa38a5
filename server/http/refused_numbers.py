"""The number of an operation whose body is refused is used up: the operations after it need not wait for it.

Routes that have read a body use its number up themselves (`operations/submits.py`). This is for bodies that
no route has read: those that are too long, compressed or written in a way that nobody understands, cut off,
or with a field of the wrong type. The model and the number may be anywhere in JSON (`wire/peek.py`).
"""

from __future__ import annotations

import asyncio
import contextlib

import orjson
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import ApiError
from ..models.submits import UnusedNumbers
from ..wire import peek
from .provided import Services

PATHS = frozenset(
    f"/api/v1/{name}"
    for name in (
        *("forward_backward", "forward", "optim_step", "abort_gradient_epoch", "load_weights"),
        *("save_weights", "save_weights_for_sampler", "save_weights_external"),
    )
)
"""The routes whose bodies are numbered operations of models."""
_FINAL = frozenset({400, 411, 413, 415, 422})
_TOO_LARGE = 413
_READ_BYTES = 1 << 30
_READ_SECONDS = 1.0


class RefusedNumbers:
    """ASGI middleware, inside of authentication and outside of the limits of bodies."""

    def __init__(self, app: ASGIApp, services: Services):
        self._app = app
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in PATHS:
            await self._app(scope, receive, send)
            return
        body = _Numbered(receive, Headers(scope=scope).get("content-encoding", "").strip().lower())
        start: Message | None = None

        async def refused_first(message: Message) -> None:
            """Sends the answer on, once the number of a refused body is used up."""
            nonlocal start
            if message["type"] == "http.response.start" and message["status"] in _FINAL:
                start = message
                return
            if start is not None:
                await body.read_on()
                if body.is_complete or start["status"] == _TOO_LARGE:
                    await self._use_up(scope["state"]["owner"], body, message.get("body", b""))
                await send(start)
                start = None
            await send(message)

        await self._app(scope, body.receive, refused_first)

    async def _use_up(self, owner: str, body: _Numbered, answer: bytes) -> None:
        model_id, seq_id = body.numbered()
        message = "the body was refused"
        with contextlib.suppress(orjson.JSONDecodeError, KeyError, TypeError):
            message = str(orjson.loads(answer)["detail"])
        with contextlib.suppress(ApiError):  # the ledger cannot be written: the others wait, as for any gap
            await self._services[UnusedNumbers].consume(owner, model_id, seq_id, message)


class _Numbered:
    """A body that others receive, as far as it says which operation it is."""

    def __init__(self, receive: Receive, encoding: str):
        self._receive = receive
        self._encoding = encoding
        self._head, self._size = b"", 0
        self._json: peek.JsonNumber | None = None
        self.is_complete = False
        self._is_over = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._note(message.get("body", b""))
            self.is_complete = not message.get("more_body", False)
        self._is_over = self.is_complete or message["type"] == "http.disconnect"
        return message

    def _note(self, piece: bytes) -> None:
        if not self._size and self._encoding in ("", "identity") and peek.is_json(piece):
            self._json = peek.JsonNumber()
        self._size += len(piece)
        if self._json is not None:
            self._json.feed(piece)
        elif len(self._head) < peek.COMPRESSED_HEAD_BYTES:
            self._head += piece[: peek.COMPRESSED_HEAD_BYTES - len(self._head)]

    async def read_on(self) -> None:
        """Receive what the client is still sending, which may have the number; give up soon if it waits for
        our answer instead."""
        with contextlib.suppress(TimeoutError):
            while not self._is_over and self._size < _READ_BYTES:
                await asyncio.wait_for(self.receive(), _READ_SECONDS)

    def numbered(self) -> tuple[object, object]:
        if self._json is not None:
            return self._json.found(self.is_complete)
        return peek.of_head(self._head, self._encoding)
