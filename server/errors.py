"""What can go wrong, as exceptions, and the one place that turns them into HTTP answers.

Every error body has the same keys in all dialects: `detail` and `error` (the message), `category`
(`user` or `server`), `status_code` and `path`. Under `/v1`, `error` is an object, as OpenAI's clients expect
(`openai_errors.py`), and a body that cannot be read is 400 rather than 422.
"""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from sqlalchemy.exc import OperationalError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import openai_errors

log = logging.getLogger("tinsmith.server")


class ApiError(Exception):
    """An error that the client is told about, with the status it is told with."""

    status = 500
    category = "server"
    headers: dict[str, str] = {}  # noqa: RUF012
    code: str | None = None
    """OpenAI's word for it, where there is one."""

    def __init__(self, message: str):
        super().__init__(message)
        self.message = message

    @property
    def final(self) -> bool:
        """Whether the same request sent again would be refused again."""
        return self.status < 500 and self.status != 429


class BadRequest(ApiError):
    """The request is wrong and would be wrong every time; the message says what would be right."""

    status = 400
    category = "user"


class Invalid(ApiError):
    """The body is not what the route takes."""

    status = 422
    category = "user"


class Unauthorized(ApiError):
    status = 401
    category = "user"


class InvalidToken(Unauthorized):
    """The SDK exchanges its key for another token and sends the request once more (RFC 6750)."""

    headers = {"WWW-Authenticate": 'Bearer error="invalid_token"'}  # noqa: RUF012


class Forbidden(ApiError):
    """What it is asked with does not open it."""

    status = 403
    category = "user"


class QuotaExceeded(ApiError):
    """The tenant has as many as it may have; waiting alone does not help."""

    status = 403
    category = "user"


class NotFound(ApiError):
    """No such thing, or none of the caller's own: the two look alike on purpose."""

    status = 404
    category = "user"


class UnknownModel(NotFound):
    code = "model_not_found"


class ContextTooLong(BadRequest):
    code = "context_length_exceeded"


class Gone(ApiError):
    """It was there once, or never; it will not come back."""

    status = 410
    category = "user"


class ClientGone(ApiError):
    """The client closed its connection; nobody reads this answer. The status is the one that nginx logs."""

    status = 499
    category = "user"


class TooLarge(ApiError):
    status = 413
    category = "user"


class UnsupportedMediaType(ApiError):
    """The body's content type is missing, or is not taken here."""

    status = 415
    category = "user"


class TooManyRequests(ApiError):
    """Sent again later, the request is welcome. The SDK waits, samples for a second and all else for
    `seconds`, and sends fewer samples at once."""

    status = 429
    category = "user"

    def __init__(self, message: str, seconds: float = 1.0):
        super().__init__(message)
        self.headers = {"Retry-After": str(max(1, min(60, math.ceil(seconds))))}


class Unavailable(ApiError):
    """The request was right and can be sent again after `Retry-After`."""

    status = 503
    headers = {"Retry-After": "5"}  # noqa: RUF012


class StorageFull(ApiError):
    """There is no room; there may be when something is deleted."""

    status = 507
    headers = {"Retry-After": "10"}  # noqa: RUF012


class StorageQuotaExceeded(StorageFull):
    """The tenant's own doing, and its own to end."""

    category = "user"
    headers = {"Retry-After": "5"}  # noqa: RUF012


def internal_error(what: str, error: BaseException) -> str:
    """Logs an error of our own; returns the message for the client, with the id that finds it in the log."""
    error_id = uuid.uuid4().hex[:12]
    log.error("%s failed, error id %s", what, error_id, exc_info=error)
    return f"internal error {error_id}: the server's log has the cause under this id"


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
    """The one error body. A 5xx of a submit is retried by clients, a 4xx is final. `param` and `code` are
    shown to OpenAI's clients only: the field that is wrong, and OpenAI's word for the error."""
    # Messages quote what was sent, and JSON can have halves of surrogate pairs, which UTF-8 cannot.
    message, path = (text.encode(errors="backslashreplace").decode() for text in (message, request_path))
    body: dict[str, Any] = {
        "detail": message,
        "error": message,
        "category": category,
        "status_code": status,
        "path": path,
    }
    if openai_errors.speaks_openai(path):
        body["error"] = openai_errors.error_object(status, message, param, code)
    return Response(orjson.dumps(body), status, headers=headers, media_type="application/json")


def api_error_response(request_path: str, error: ApiError) -> Response:
    """`error_response` of an exception."""
    return error_response(
        request_path, error.status, error.message, error.category, error.headers, code=error.code
    )


def _unreadable_ledger(request_path: str, error: OperationalError) -> Response:
    log.error("the ledger cannot be read: %s", error)
    message = "the ledger cannot be read at the moment; try again"
    return error_response(request_path, 503, message, "server", Unavailable.headers)


class Unhandled:
    """ASGI middleware, outside of all others: answers what nothing inside has handled, with an error id.

    Starlette's own way is to answer and then to raise the exception again, upon which uvicorn closes the
    connection; a client that has sent its next request on it by then gets a reset. An answer that has begun
    cannot be mended: its connection is closed, so that the client sees that it is cut.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_begun = is_complete = False

        async def noted(message: Message) -> None:
            nonlocal has_begun, is_complete
            has_begun = True
            is_complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except (Exception, asyncio.CancelledError) as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise  # the server stops
            if has_begun and not is_complete:
                raise
            answer = _unhandled(scope, error)
            if not has_begun:
                await answer(scope, receive, send)


def _unhandled(scope: Scope, error: BaseException) -> Response:
    """Also what is raised while another error is answered, as when the ledger cannot be written."""
    if isinstance(error, ApiError):
        return api_error_response(scope["path"], error)
    if isinstance(error, OperationalError):
        return _unreadable_ledger(scope["path"], error)
    message = internal_error(f"{scope['method']} {scope['path']}", error)
    return error_response(scope["path"], 500, message, "server")


_MESSAGES = {
    "extra_forbidden": "not supported here, or not with this value",
    "model_type": "Input should be an object",
    "model_attributes_type": "Input should be an object",
}


def describe(errors: list[dict[str, Any]]) -> str:
    """Pydantic's errors in one line: `lora_config.rank: Input should be ...; ...`."""
    parts = []
    for error in errors[:5]:
        where = ".".join(
            str(part) for part in error["loc"] if part != "body" and not openai_errors.is_union_tag(part)
        )
        message = _MESSAGES.get(error["type"]) or error["msg"].removeprefix("Value error, ")
        parts.append(f"{where}: {message}" if where else message)
    return "; ".join(parts) or "invalid request"


def install(app: FastAPI) -> None:
    """Renders the exceptions of `app`'s routes as above."""

    @app.exception_handler(ApiError)
    async def _api_error(request: Request, error: ApiError) -> Response:
        return api_error_response(request.url.path, error)

    @app.exception_handler(RequestValidationError)
    async def _validation_error(request: Request, error: RequestValidationError) -> Response:
        errors = list(error.errors())
        message = describe(errors)
        if openai_errors.speaks_openai(request.url.path):
            param = openai_errors.invalid_field(errors[0]) if errors else None
            return error_response(request.url.path, 400, message, "user", param=param)
        return error_response(request.url.path, 422, message, "user")

    @app.exception_handler(OperationalError)
    async def _ledger_error(request: Request, error: OperationalError) -> Response:
        return _unreadable_ledger(request.url.path, error)

    @app.exception_handler(HTTPException)
    async def _http_error(request: Request, error: HTTPException) -> Response:
        category = "user" if error.status_code < 500 else "server"
        code, message = None, str(error.detail)
        if error.status_code == 404 and openai_errors.speaks_openai(request.url.path):
            code = openai_errors.UNKNOWN_URL
            message = f"there is no route {request.method} {request.url.path}"
        return error_response(
            request.url.path, error.status_code, message, category, dict(error.headers or {}), code=code
        )
