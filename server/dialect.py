"""Three APIs on the same routes, and the few points in which they differ.

Requests may have the shape of any of them, and answers have the fields of all; what is here is the rest.
`tinker` is what the SDK speaks, `tinkercloud` and `xorl` are the REST APIs of the servers of these names.
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
class Points:
    """What a dialect has of its own. The statuses are those of polls."""

    scheme: str
    pending_status: int
    failed_status: int
    unknown_status: int
    grad_normalization: messages.GradNormalization
    target_alignment: messages.TargetAlignment
    default_rank: int  # of a model that says nothing of adapters; 0: its full weights are trained
    temperature: float
    top_p: float
    top_k: int
    max_tokens: int | None
    stops_add: bool  # whether stops are beside the model's own end tokens, as in SGLang, or instead of them
    elementwise_loss: bool  # whether answers have each token's loss, where the request does not say


# On 410 the SDK samples again under a new number; 404 would be its end.
POINTS: dict[Dialect, Points] = {
    "tinker": Points(paths.SCHEME, 408, 200, 410, "sum", "shifted", 0, 1.0, 1.0, -1, None, False, False),
    "tinkercloud": Points(paths.SCHEME, 408, 400, 404, "sum", "by_shape", 0, 0.7, 0.9, 50, 256, True, True),
    "xorl": Points(
        paths.XORL_SCHEME, 200, 200, 404, "token_mean", "by_shape", 32, 1.0, 1.0, -1, None, True, True
    ),
}


def said(headers: Mapping[str, str], path: str) -> Dialect | None:
    """Whose request this is: by `X-API-Dialect`, or by what only clients of one dialect send.

    None: nothing tells, and what the request is about decides. Raises BadRequest for a dialect there is not.
    """
    named = headers.get(HEADER)
    if named is not None:
        if named not in POINTS:
            raise BadRequest(f"{HEADER}: {named[:32]!r} is not one of {', '.join(POINTS)}")
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
