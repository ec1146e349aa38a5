"""Large JSON bodies are parsed and checked in another process; FastAPI then finds them as they should be.

Bodies of JSON whose content type does not say so, as `curl -d` sends them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from ..base_models import BaseModels
from ..errors import BadRequest, ClientGone, UnsupportedMediaType
from ..offload import INLINE_BYTES, Offload
from ..wire import long_numbers
from .provided import provided

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


class InvalidBody(Exception):
    """`errors` are pydantic's."""

    def __init__(self, errors: list[dict[str, Any]]):
        super().__init__(errors)
        self.errors = errors


class BodyRoute(APIRoute):
    """Use it as the `route_class` of routers whose routes have bodies."""

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
                if sum(map(len, pieces)) > INLINE_BYTES:
                    request._body = b"parsed"
                    request._json = await _parsed_aside(request, pieces, model)
                else:
                    request._body = b"".join(pieces)
                    if request._body:
                        request._json = _parsed_here(request._body)
                pieces.clear()
                await body_is_read(request)
            return await handle(request)

        return handle_any_size


async def received(request: Request) -> list[bytes]:
    """The body in the pieces that it comes in. Raises ClientGone."""
    try:
        return [piece async for piece in request.stream()]
    except ClientDisconnect:
        raise ClientGone("the client closed its connection before the whole body was there") from None


async def body_is_read(request: Request) -> None:
    """The bytes of the body are not needed any more, however long the request still takes."""
    if (give_back := getattr(request.state, "body_is_read", None)) is not None:
        await give_back()


async def _parsed_aside(request: Request, pieces: list[bytes], model: type[BaseModel]) -> BaseModel:
    base_models = provided(request, BaseModels)
    longest = max((each.max_sequence_length for each in base_models.values()), default=0)
    try:
        return await provided(request, Offload).in_process(request.state.owner, parse, pieces, model, longest)
    except InvalidBody as error:
        raise RequestValidationError(error.errors) from None


def _parsed_here(raw: bytes) -> Any:
    try:
        return _content(raw)
    except InvalidBody as error:
        raise RequestValidationError(error.errors) from None


def _is_json(request: Request) -> bool:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def parse(raw: bytes, model: type[BaseModel], longest: int) -> BaseModel:
    """The body as FastAPI would read it, if no prompt has more than the `longest` context's tokens. Raises
    InvalidBody, or BadRequest."""
    content = _content(raw)
    try:
        body = model.model_validate(content)
    except ValidationError as error:
        errors = [
            {"type": each["type"], "loc": ("body", *each["loc"]), "msg": each["msg"]}
            for each in error.errors(include_url=False, include_context=False, include_input=False)
        ]
        raise InvalidBody(errors[:100]) from None

    for prompt in getattr(body, "prompts", None) or []:
        if not isinstance(prompt, str) and len(prompt) > longest:
            raise BadRequest(f"prompt: {len(prompt)} tokens are over the limit of {longest}")
    return body


def _content(raw: bytes) -> Any:
    """The JSON. Raises InvalidBody, or BadRequest."""
    try:
        return json.loads(raw)
    except json.JSONDecodeError as error:
        place = {"type": "json_invalid", "loc": ("body", error.pos), "msg": "JSON decode error"}
        raise InvalidBody([place | {"ctx": {"error": error.msg}}]) from None
    except (ValueError, RecursionError):
        long = long_numbers.find(raw, long_numbers.over_python_limit)
        if long is None:
            raise BadRequest("There was an error parsing the body") from None
        place = {"type": "int_parsing_size", "loc": ("body", *long.location), "msg": long.message}
        raise InvalidBody([place]) from None
