"""What can go wrong, as exceptions. `http/errors.py` turns them into answers."""

from __future__ import annotations

import logging
import math
import uuid

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
