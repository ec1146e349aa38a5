"""The number of an operation whose body is refused is used up: the operations after it need not wait for it.

Routes that have read a body use its number up themselves (`operations/submits.py`). This is for bodies that
no route has read: those that are too long, compressed or written in a way that nobody understands, or cut
off. Model and number are mostly among the first bytes of such a body, or the last.
"""

from __future__ import annotations

import asyncio
import contextlib

import orjson
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .backend import Backend
from .errors import ApiError
from .wire import peek

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

    def __init__(self, app: ASGIApp, backend: Backend):
        self._app = app
        self._backend = backend

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in PATHS:
            await self._app(scope, receive, send)
            return
        body = _Ends(receive, Headers(scope=scope).get("content-encoding", "").strip().lower())
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

    async def _use_up(self, owner: str, body: _Ends, answer: bytes) -> None:
        model_id, seq_id = body.numbered()
        message = "the body was refused"
        with contextlib.suppress(orjson.JSONDecodeError, KeyError, TypeError):
            message = str(orjson.loads(answer)["detail"])
        with contextlib.suppress(ApiError):  # the ledger cannot be written: the others wait, as for any gap
            await self._backend.runs.unused_numbers.consume(owner, model_id, seq_id, message)


class _Ends:
    """The first and the last bytes of a body that others receive."""

    def __init__(self, receive: Receive, encoding: str):
        self._receive = receive
        self._encoding = encoding
        is_plain = encoding in ("", "identity")
        self._head_bytes = peek.HEAD_BYTES if is_plain else peek.COMPRESSED_HEAD_BYTES
        self._head, self._tail, self._size = b"", b"", 0
        self.is_complete = False
        self._is_over = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            piece = message.get("body", b"")
            self._size += len(piece)
            taken = self._head_bytes - len(self._head)
            if taken > 0:
                self._head += piece[:taken]
            behind = piece[max(taken, len(piece) - peek.TAIL_BYTES, 0) :]
            self._tail = (self._tail + behind)[-peek.TAIL_BYTES :]
            self.is_complete = not message.get("more_body", False)
        self._is_over = self.is_complete or message["type"] == "http.disconnect"
        return message

    async def read_on(self) -> None:
        """Receive what the client is still sending, which may end with the number; give up soon if it waits
        for our answer instead."""
        with contextlib.suppress(TimeoutError):
            while not self._is_over and self._size < _READ_BYTES:
                await asyncio.wait_for(self.receive(), _READ_SECONDS)

    def numbered(self) -> tuple[object, object]:
        whole = self.is_complete and len(self._head) + len(self._tail) == self._size
        tail = self._tail if self.is_complete else b""
        return peek.numbered(self._head, tail, whole, self._encoding)
