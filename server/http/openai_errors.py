"""Errors in OpenAI's shape, for the routes under `/v1`.

OpenAI's clients read `error.message`, `error.type`, `error.param` and `error.code`; a plain text in `error`
leaves their exceptions empty.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..wire.body import is_union_tag

UNKNOWN_URL = "unknown_url"
_PREFIX = "/v1"
_CODES = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}
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
