"""Turns exceptions into HTTP answers.

Every error body has the same keys in all dialects: `detail` and `error` (the message), `category`
(`user` or `server`), `status_code` and `path`. Under `/v1`, `error` is an object with `message`, `type`,
`param` and `code`, without which the exceptions of OpenAI's clients are empty, and a body that cannot be read
is 400 rather than 422.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from sqlalchemy.exc import OperationalError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Scope

from ..errors import ApiError, ClientGone, Unavailable, internal_error
from ..wire import describe, is_union_tag

UNKNOWN_URL = "unknown_url"
_PREFIX = "/v1"
_CODES = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}
# Messages about a field begin with its name: `messages[0].content: ...`.
_FIELD = re.compile(r"([a-z_]\w*(?:\.\w+|\[\d+\])*): ")


def speaks_openai(path: str) -> bool:
    """Return whether the clients of this path are OpenAI's."""
    return path == _PREFIX or path.startswith(f"{_PREFIX}/")


def error_object(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, str | None]:
    """Return the value of `error`. Without `param`, it is the field that the message begins with."""
    if code is None:
        code = _CODES.get(status)
    if param is None:
        found = _FIELD.match(message)
        param = found[1] if found else "model" if code == "model_not_found" else None
    kind = "requests" if status == 429 else "invalid_request_error" if status < 500 else "server_error"
    return {"message": message, "type": kind, "param": param, "code": code}


def invalid_field(error: Mapping[str, Any]) -> str | None:
    """Return the field that one of pydantic's errors is about, such as `messages[0].content`."""
    path = ""
    for part in error["loc"]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part != "body" and not is_union_tag(part):
            path += f".{part}" if path else part
    own = _FIELD.match(str(error["ctx"]["error"])) if error["type"] == "value_error" else None
    if own:
        path += f".{own[1]}" if path else own[1]
    return path if path[:1].isidentifier() else None


log = logging.getLogger("tinsmith.server")


def error_response(
    request_path: str,
    status: int,
    message: str,
    category: str,
    headers: dict | None = None,
    *,
    param: str | None = None,
    code: str | None = None,
) -> Response:
    """Build the error body. Clients retry a submit after a 5xx; a 4xx is final. Only OpenAI's clients see
    `param`, the field that is wrong, and `code`, OpenAI's word for the error."""
    # Messages quote what was sent, and JSON can have halves of surrogate pairs, which UTF-8 cannot.
    message, path = (text.encode(errors="backslashreplace").decode() for text in (message, request_path))
    body: dict[str, Any] = {
        "detail": message,
        "error": message,
        "category": category,
        "status_code": status,
        "path": path,
    }
    if speaks_openai(path):
        body["error"] = error_object(status, message, param, code)
    return Response(orjson.dumps(body), status, headers=headers, media_type="application/json")


def api_error_response(request_path: str, error: ApiError) -> Response:
    """Build the error body of an exception."""
    return error_response(
        request_path, error.status, error.message, error.category, error.headers, code=error.code
    )


def _unreadable_ledger(request_path: str, error: OperationalError) -> Response:
    log.error("the ledger cannot be read: %s", error)
    message = "the ledger cannot be read at the moment; try again"
    return error_response(request_path, 503, message, "server", Unavailable.headers)


def unhandled(scope: Scope, error: BaseException) -> Response:
    """Answer an exception, also one that was raised while another error was answered."""
    if isinstance(error, ApiError):
        return api_error_response(scope["path"], error)
    if isinstance(error, OperationalError):
        return _unreadable_ledger(scope["path"], error)
    message = internal_error(f"{scope['method']} {scope['path']}", error)
    return error_response(scope["path"], 500, message, "server")


_UNDER_V1 = frozenset({"/completions", "/chat/completions", "/models"})


def _no_route(method: str, path: str) -> str:
    """Return a message for an unknown path, with a hint if the client's base URL seems wrong."""
    message = f"there is no route {method} {path}"
    if path in _UNDER_V1:
        return f"{message}; end the client's base URL with /v1"
    if "/api/v1/" in path[1:]:
        return f"{message}; the client adds /api/v1 by itself: leave it out of the base URL"
    if path.startswith("/v1/v1/"):
        return f"{message}; end the client's base URL with one /v1"
    return message


def install(app: FastAPI) -> None:
    """Register the handlers that turn exceptions of `app`'s routes into error bodies."""

    @app.exception_handler(ApiError)
    async def _api_error(request: Request, error: ApiError) -> Response:
        return api_error_response(request.url.path, error)

    @app.exception_handler(ClientDisconnect)
    async def _client_gone(request: Request, _error: ClientDisconnect) -> Response:
        gone = ClientGone("the client closed its connection before the whole body was there")
        return api_error_response(request.url.path, gone)

    @app.exception_handler(RequestValidationError)
    async def _validation_error(request: Request, error: RequestValidationError) -> Response:
        errors = list(error.errors())
        message = describe(errors)
        if speaks_openai(request.url.path):
            param = invalid_field(errors[0]) if errors else None
            return error_response(request.url.path, 400, message, "user", param=param)
        return error_response(request.url.path, 422, message, "user")

    @app.exception_handler(OperationalError)
    async def _ledger_error(request: Request, error: OperationalError) -> Response:
        return _unreadable_ledger(request.url.path, error)

    @app.exception_handler(HTTPException)
    async def _http_error(request: Request, error: HTTPException) -> Response:
        category = "user" if error.status_code < 500 else "server"
        code, message = None, str(error.detail)
        if error.status_code == 404:
            code, message = UNKNOWN_URL, _no_route(request.method, request.url.path)
        return error_response(
            request.url.path, error.status_code, message, category, dict(error.headers or {}), code=code
        )
