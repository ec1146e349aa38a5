"""Request bodies: their limits, how JSON is read, and the numbers of operations whose bodies are refused."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.types import Scope

from ..base_models import BaseModels
from ..errors import ApiError, UnsupportedMediaType
from ..models.submits import UnusedNumbers
from ..offload import INLINE_BYTES, Offload
from ..wire import InvalidBody, parse, read_json
from ..wire.training import COMPRESSED_HEAD_BYTES, JsonNumber, is_json, peek_head
from .dependencies import Services, parameters_of, provided, resolved

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


@dataclass(frozen=True)
class BodyLimits:
    """The bytes that bodies may have: `usual`, or those of their path in `own`.

    Bodies over `SMALL_BYTES` wait for their share of the `budget`, unless they are written to disk as they
    arrive (the paths in `streamed`).
    """

    usual: int
    own: Mapping[str, int]
    budget: Budget
    streamed: Collection[str] = ()


TAKEN_FOR_JSON = (b"", b"application/x-www-form-urlencoded", b"text/plain")
"""Content types of clients that were given none for their body: no route takes a form or plain text."""


def as_json(scope: Scope) -> None:
    """Mark a body as JSON if it has no content type, or that of `curl -d`."""
    kinds = [value for name, value in scope["headers"] if name == b"content-type"]
    if all(kind.partition(b";")[0].strip().lower() in TAKEN_FOR_JSON for kind in kinds):
        headers = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
        scope["headers"] = [*headers, (b"content-type", b"application/json")]


class BodyRoute(APIRoute):
    """Reads the JSON body of a route, a large one in another process. The `route_class` of routers with
    bodies.

    A function that takes nothing from the URL and returns a `Response` is called directly: FastAPI's way to
    it takes longer than most of these functions.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any):
        self._function = endpoint
        super().__init__(path, resolved(endpoint), **options)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        model = None if self.body_field is None else self.body_field.field_info.annotation
        body: type[BaseModel] | None = None
        if isinstance(model, type) and issubclass(model, BaseModel):
            body = model
            handle = _any_size(handle, body)
        function, parameters = self._function, parameters_of(self._function)
        own = [each.name for each in parameters.own if each.name != parameters.request]
        answers = inspect.signature(function, eval_str=True).return_annotation
        if answers is not Response or len(own) != (body is not None):
            return handle

        async def handle_directly(request: Request) -> Response:
            values = {name: get(request) for name, get in parameters.getters.items()}
            if parameters.request:
                values[parameters.request] = request
            if body is not None:
                headers = request.headers
                is_plain = headers.get("content-type") == "application/json"
                if (
                    "content-encoding" in headers
                    or not is_plain
                    or int(headers.get("content-length", sys.maxsize)) > INLINE_BYTES
                ):
                    return await handle(request)
                try:
                    values[own[0]] = body.model_validate(json.loads(await request.body()))
                except (ValueError, RecursionError):  # also pydantic's; FastAPI names what is wrong
                    return await handle(request)
            return await function(**values)

        return handle_directly


def _any_size(
    handle: Callable[[Request], Coroutine[Any, Any, Response]], model: type[BaseModel]
) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    """Return a handler that reads a JSON body of any size before FastAPI has it."""

    async def handle_any_size(request: Request) -> Response:
        if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise UnsupportedMediaType("Content-Encoding: this route takes bodies as they are; send none")
        if _is_json(request):
            pieces = [piece async for piece in request.stream()]
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


async def body_is_read(request: Request) -> None:
    """Give back the memory for the body's bytes, which are not needed any more."""
    if (give_back := getattr(request.state, "body_is_read", None)) is not None:
        await give_back()


def _is_json(request: Request) -> bool:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


NUMBERED_PATHS = frozenset(
    f"/api/v1/{name}"
    for name in (
        *("forward_backward", "forward", "optim_step", "abort_gradient_epoch", "load_weights"),
        *("save_weights", "save_weights_for_sampler", "save_weights_external"),
    )
)
"""The routes whose bodies are numbered operations of models."""
FINAL = frozenset({400, 411, 413, 415, 422})
"""Statuses of bodies that are refused for good."""


@dataclass(eq=False)
class OperationNumber:
    """Finds out, while a body arrives, which operation it is, and uses up its number if it is refused.

    For bodies that are too long, compressed or written in a way that the server does not read, cut off, or
    with a field of the wrong type. The model and the number may be anywhere in the JSON (`wire/training.py`).
    """

    services: Services
    owner: str
    encoding: str
    head: bytearray = field(default_factory=bytearray)  # of the body
    is_complete: bool = False  # the body has arrived as a whole
    _json: JsonNumber | None = None  # of JSON that is longer than the head

    def note(self, piece: bytes) -> None:
        """Take in the next piece of a body that is longer than the head."""
        if self._json is not None:
            self._json.feed(piece)
        elif self.encoding in ("", "identity") and is_json(bytes(self.head) + piece[:_SPACES]):
            self._json = JsonNumber()
            self._json.feed(bytes(self.head) + piece)
        else:
            self.head += piece[: COMPRESSED_HEAD_BYTES - len(self.head)]

    async def use_up(self, answer: bytes) -> None:
        """Use up the number; `answer` is the body of the refusal."""
        model_id, seq_id = self._found()
        message = "the body was refused"
        with contextlib.suppress(orjson.JSONDecodeError, KeyError, TypeError):
            message = str(orjson.loads(answer)["detail"])
        with contextlib.suppress(ApiError):  # the ledger cannot be written: the others wait, as for any gap
            await self.services[UnusedNumbers].consume(self.owner, model_id, seq_id, message)

    def _found(self) -> tuple[object, object]:
        head = bytes(self.head)
        if self._json is None and self.encoding in ("", "identity") and is_json(head):
            self._json = JsonNumber()
            self._json.feed(head)
        if self._json is not None:
            return self._json.found(self.is_complete)
        return peek_head(head, self.encoding)


_SPACES = 64  # that may come before a JSON object
