"""Request bodies: their limits, how JSON is read, and the numbers of operations whose bodies are refused."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..base_models import BaseModels
from ..errors import ApiError, ClientGone, UnsupportedMediaType
from ..models.submits import UnusedNumbers
from ..offload import INLINE_BYTES, Offload
from ..wire import InvalidBody, parse, read_json
from ..wire.training import COMPRESSED_HEAD_BYTES, JsonNumber, is_json, peek_head
from .dependencies import Services, provided, resolved
from .errors import error_response

# The bodies of all other routes describe something: names, paths, metadata.
USUAL_BYTES = 1 << 20
# Prompts: the longest contexts there are, and the tokens whose log-probs are asked for at each place of one.
SAMPLING_BYTES = 16 << 20
SMALL_BYTES = 1 << 20
_OF_OWNER, _OF_ALL = 2, 8  # times the longest body
_TRAINING = ("/api/v1/forward_backward", "/api/v1/forward")
_SAMPLING = (
    *("/api/v1/asample", "/api/v1/sample"),
    *("/generate", "/v1/completions", "/v1/chat/completions"),
)


def of_training_and_sampling(max_body_bytes: int) -> dict[str, int]:
    """Return the limits of the bodies of training and sampling routes, in bytes by path."""
    own = dict.fromkeys(_TRAINING, max_body_bytes)
    return own | dict.fromkeys(_SAMPLING, min(SAMPLING_BYTES, max_body_bytes))


class Budget:
    """Limits the bytes of large bodies in memory, of one owner and of all. Further bodies wait unread."""

    def __init__(self, of_owner: int, of_all: int):
        self._of_owner = of_owner
        self._of_all = of_all
        self._taken: Counter[str] = Counter()
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def take(self, owner: str, size: int) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """Wait for this many bytes. The end, or the yielded function, gives them back."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._has_room(owner, size))
            self._taken[owner] += size
        held = size

        async def give_back() -> None:
            nonlocal held
            async with self._changed:
                self._taken[owner] -= held
                held = 0
                self._taken += Counter()  # forgets owners without any
                self._changed.notify_all()

        try:
            yield give_back
        finally:
            await asyncio.shield(give_back())

    def _has_room(self, owner: str, size: int) -> bool:
        alone = not self._taken[owner]
        fits = self._taken[owner] + size <= self._of_owner
        return (alone or fits) and (not self._taken or self._taken.total() + size <= self._of_all)


def budget(max_body_bytes: int) -> Budget:
    return Budget(_OF_OWNER * max_body_bytes, _OF_ALL * max_body_bytes)


class BodyLimits:
    """ASGI middleware: answers 413 to bodies over `usual` bytes, or over the limit of their path in `own`.

    Bodies over `SMALL_BYTES` wait for their share of the `budget`, unless they are written to disk as they
    arrive (`streamed`).
    """

    def __init__(
        self,
        app: ASGIApp,
        usual: int,
        own: Mapping[str, int],
        budget: Budget | None = None,
        streamed: Collection[str] = (),
    ):
        self._app = app
        self._usual = usual
        self._own = own
        self._budget = budget
        self._streamed = streamed

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

        size = int(declared) if int(declared) or not _is_chunked(scope) else limit
        try:
            if self._budget is None or size <= SMALL_BYTES or scope["path"] in self._streamed:
                await self._app(scope, counted, guarded)
            else:
                state = scope.setdefault("state", {})
                async with self._budget.take(state.get("owner", ""), size) as state["body_is_read"]:
                    await self._app(scope, counted, guarded)
        finally:
            if over:
                await _refuse(limit, scope, receive, send)


def _is_chunked(scope: Scope) -> bool:
    return "transfer-encoding" in HTTPConnection(scope).headers


async def _refuse(limit: int, scope: Scope, receive: Receive, send: Send) -> None:
    message = f"the body is over the limit of {limit} bytes"
    await error_response(scope["path"], 413, message, "user")(scope, receive, send)


_TAKEN_FOR_JSON = (b"", b"application/x-www-form-urlencoded", b"text/plain")
"""Content types of clients that were given none for their body: no route takes a form or plain text."""


class JsonBodies:
    """ASGI middleware: marks bodies as JSON if they have no content type, or that of `curl -d`.

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


class BodyRoute(APIRoute):
    """Reads the JSON body of a route, a large one in another process. The `route_class` of routers with
    bodies."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any):
        super().__init__(path, resolved(endpoint), **options)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        model = None if self.body_field is None else self.body_field.field_info.annotation
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return handle

        async def handle_any_size(request: Request) -> Response:
            if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
                raise UnsupportedMediaType("Content-Encoding: this route takes bodies as they are; send none")
            if _is_json(request):
                pieces = await received(request)
                try:
                    if sum(map(len, pieces)) > INLINE_BYTES:
                        longest = max(
                            (each.max_sequence_length for each in provided(request, BaseModels).values()),
                            default=0,
                        )
                        request._json = await provided(request, Offload).in_process(
                            request.state.owner, parse, pieces, model, longest
                        )
                        request._body = b"parsed"
                    else:
                        request._body = b"".join(pieces)
                        if request._body:
                            request._json = read_json(request._body)
                except InvalidBody as error:
                    raise RequestValidationError(error.errors) from None
                pieces.clear()
                await body_is_read(request)
            return await handle(request)

        return handle_any_size


async def received(request: Request) -> list[bytes]:
    """Return the body in the pieces in which it arrives. Raises ClientGone."""
    try:
        return [piece async for piece in request.stream()]
    except ClientDisconnect:
        raise ClientGone("the client closed its connection before the whole body was there") from None


async def body_is_read(request: Request) -> None:
    """Give back the memory for the body's bytes, which are not needed any more."""
    if (give_back := getattr(request.state, "body_is_read", None)) is not None:
        await give_back()


def _is_json(request: Request) -> bool:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


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
    """ASGI middleware: uses up the number of an operation whose body is refused, so that the operations after
    it need not wait for it.

    It is inside authentication and outside `BodyLimits`. Routes that have read a body use its number up
    themselves (`models/submits.py`). This is for bodies that no route has read: those that are too long,
    compressed or written in a way that the server does not read, cut off, or with a field of the wrong type.
    The model and the number may be anywhere in the JSON (`wire/training.py`).
    """

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
            """Send the answer on, after the number of a refused body is used up."""
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
    """Passes a body on, and finds out which operation it is while it arrives."""

    def __init__(self, receive: Receive, encoding: str):
        self._receive = receive
        self._encoding = encoding
        self._head, self._size = b"", 0
        self._json: JsonNumber | None = None
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
        if not self._size and self._encoding in ("", "identity") and is_json(piece):
            self._json = JsonNumber()
        self._size += len(piece)
        if self._json is not None:
            self._json.feed(piece)
        elif len(self._head) < COMPRESSED_HEAD_BYTES:
            self._head += piece[: COMPRESSED_HEAD_BYTES - len(self._head)]

    async def read_on(self) -> None:
        """Receive the rest of the body, which may have the number; give up soon if the client waits."""
        with contextlib.suppress(TimeoutError):
            while not self._is_over and self._size < _READ_BYTES:
                await asyncio.wait_for(self.receive(), _READ_SECONDS)

    def numbered(self) -> tuple[object, object]:
        if self._json is not None:
            return self._json.found(self.is_complete)
        return peek_head(self._head, self._encoding)
