"""Dialects: three APIs on the same routes, and where they differ.

Requests may have the shape of any of them, and answers have the fields of all. `tinker` is what the SDK
speaks; `tinkercloud` and `xorl` are the REST APIs of the servers of these names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..ckpt import paths
from ..engine import messages
from .errors import BadRequest

Dialect = Literal["tinker", "tinkercloud", "xorl"]
HEADER = "x-api-dialect"
_SDK_AGENTS = ("AsyncTinker/", "Tinker/")


@dataclass(frozen=True)
class DialectRules:
    """Defaults and statuses of one dialect. The statuses are those of polls."""

    scheme: str
    pending_status: int
    failed_status: int
    unknown_status: int
    grad_normalization: messages.GradNormalization
    target_alignment: messages.TargetAlignment
    default_rank: int  # of a model created without a LoRA config; 0: full weights
    temperature: float
    top_p: float
    top_k: int
    max_tokens: int | None
    stops_add: bool  # whether stops add to the model's own end tokens, as in SGLang, or replace them
    elementwise_loss: bool  # whether answers have each token's loss by default


# On 410 the SDK samples again under a new number; on 404 it would give up.
DIALECT_RULES: dict[Dialect, DialectRules] = {
    "tinker": DialectRules(
        paths.SCHEME, 408, 200, 410, "sum", "shifted", 0, 1.0, 1.0, -1, None, False, False
    ),
    "tinkercloud": DialectRules(
        paths.SCHEME, 408, 400, 404, "sum", "by_shape", 0, 0.7, 0.9, 50, 256, True, True
    ),
    "xorl": DialectRules(
        paths.XORL_SCHEME, 200, 200, 404, "token_mean", "by_shape", 32, 1.0, 1.0, -1, None, True, True
    ),
}


def requested_dialect(headers: Mapping[str, str], path: str) -> Dialect | None:
    """Return a request's dialect: by `X-API-Dialect`, or by what only clients of one dialect send.

    None: the request does not tell, so the dialect of its model or session applies. Raises BadRequest for an
    unknown dialect.
    """
    named = headers.get(HEADER)
    if named is not None:
        if named not in DIALECT_RULES:
            raise BadRequest(f"{HEADER}: {named[:32]!r} is not one of {', '.join(DIALECT_RULES)}")
        return named
    if (
        headers.get("user-agent", "").startswith(_SDK_AGENTS)
        or headers.get("content-type", "").startswith("application/x-protobuf")
        or any(name.startswith("x-tinker-") for name in headers)
    ):
        return "tinker"
    if "x-api-key" in headers or "/retrieve_future/" in path:
        return "tinkercloud"
    if headers.get("authorization", "").lower().startswith("bearer "):
        return "xorl"
    return None
