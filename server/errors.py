"""Errors that clients are told about, as exceptions. `http/errors.py` turns them into answers."""

from __future__ import annotations

import logging
import math
import uuid

log = logging.getLogger("tinsmith.server")


class ApiError(Exception):
    """An error for the client, with the HTTP status of its answer."""

    status = 500
    category = "server"
    headers: dict[str, str] = {}  # noqa: RUF012
    code: str | None = None
    """OpenAI's code for this error, if it has one."""

    def __init__(self, message: str):
        super().__init__(message)
        self.message = message

    @property
    def final(self) -> bool:
        """True if the same request would be refused again."""
        return self.status < 500 and self.status != 429


class BadRequest(ApiError):
    """The request is wrong and always would be; the message says what would be right."""

    status = 400
    category = "user"


class Invalid(ApiError):
    """The body does not fit the route."""

    status = 422
    category = "user"


class Unauthorized(ApiError):
    status = 401
    category = "user"


class InvalidToken(Unauthorized):
    """The token is invalid. The SDK exchanges its key for another one and repeats the request (RFC 6750)."""

    headers = {"WWW-Authenticate": 'Bearer error="invalid_token"'}  # noqa: RUF012


class Forbidden(ApiError):
    """The credentials do not allow this."""

    status = 403
    category = "user"


class QuotaExceeded(ApiError):
    """The tenant has as many as it may have; waiting alone does not help."""

    status = 403
    category = "user"


class NotFound(ApiError):
    """The thing does not exist, or belongs to somebody else: the answer is the same on purpose."""

    status = 404
    category = "user"


class UnknownModel(NotFound):
    code = "model_not_found"


class ContextTooLong(BadRequest):
    code = "context_length_exceeded"


class Gone(ApiError):
    """The thing no longer exists, and will not come back."""

    status = 410
    category = "user"


class ClientGone(ApiError):
    """The client closed its connection, so nobody reads this answer. The status is nginx's."""

    status = 499
    category = "user"


class TooLarge(ApiError):
    status = 413
    category = "user"


class UnsupportedMediaType(ApiError):
    """The body's content type is missing or unsupported."""

    status = 415
    category = "user"


class TooManyRequests(ApiError):
    """The request will be accepted later.

    The SDK waits a second before it repeats a sample, and `seconds` before anything else, and sends fewer
    samples at once.
    """

    status = 429
    category = "user"

    def __init__(self, message: str, seconds: float = 1.0):
        super().__init__(message)
        self.headers = {"Retry-After": str(max(1, min(60, math.ceil(seconds))))}


class Unavailable(ApiError):
    """The request was right and can be repeated after `Retry-After`."""

    status = 503
    headers = {"Retry-After": "5"}  # noqa: RUF012


class StorageFull(ApiError):
    """There is no room until something is deleted."""

    status = 507
    headers = {"Retry-After": "10"}  # noqa: RUF012


class StorageQuotaExceeded(StorageFull):
    """The tenant's own quota is used up; it can delete something."""

    category = "user"
    headers = {"Retry-After": "5"}  # noqa: RUF012


def internal_error(what: str, error: BaseException) -> str:
    """Log an internal error. Return a message for the client, with the id that finds it in the log."""
    error_id = uuid.uuid4().hex[:12]
    log.error("%s failed, error id %s", what, error_id, exc_info=error)
    return f"internal error {error_id}: the server's log has the cause under this id"
