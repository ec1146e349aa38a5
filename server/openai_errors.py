"""Errors in OpenAI's shape, for the routes under `/v1`.

OpenAI's clients read `error.message`, `error.type`, `error.param` and `error.code`; a plain text in `error`
leaves their exceptions empty.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

UNKNOWN_URL = "unknown_url"
_PREFIX = "/v1"
_CODES = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}
_UNION_TAGS = frozenset({"str", "int", "float", "bool"})
# Messages about a field begin with its name: `messages[0].content: ...`.
_FIELD = re.compile(r"([a-z_]\w*(?:\.\w+|\[\d+\])*): ")


def speaks_openai(path: str) -> bool:
    """Whether the clients of this path are OpenAI's."""
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


def field_path(location: Sequence[Any]) -> str | None:
    """Return the field that a location of pydantic's names, such as `messages[0].content`."""
    path = ""
    for part in location:
        if part == "body":
            continue
        if isinstance(part, int):
            path += f"[{part}]"
        elif isinstance(part, str) and part.isidentifier() and part not in _UNION_TAGS:
            path += f".{part}" if path else part
        else:
            break
    return path if path[:1].isidentifier() else None
