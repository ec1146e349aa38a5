"""What the parameters of many routes have in common, and what their answers do."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Query
from sqlalchemy import Row

from ..access import Caller
from ..dialect import Dialect, requested_dialect
from ..operations.operation import Operation
from ..settings import Settings
from .openapi import BINARY, schema_of
from .provided import from_request, provided

Owner = Annotated[str, from_request(lambda request: request.state.owner)]
CallerOf = Annotated[Caller, from_request(lambda request: request.state.caller)]
# The dialect, if the request says it.
RequestedDialect = Annotated[
    Dialect | None, from_request(lambda request: requested_dialect(request.headers, request.url.path))
]
# The URL of this server, as the client sees it.
BaseUrl = Annotated[
    str,
    from_request(
        lambda request: (provided(request, Settings).public_url or str(request.base_url)).rstrip("/")
    ),
]

# Of a page of a listing.
Limit = Annotated[int, Query(ge=0, le=1000)]
Offset = Annotated[int, Query(ge=0, le=1 << 31)]


def described_as(
    answer: Any, *, events: type | None = None, binary: str | None = None
) -> dict[int | str, dict[str, Any]]:
    """Describe what a route answers with 200, for the `responses` of its decorator.

    A `response_model` would have FastAPI validate and write every answer once more; what is described here is
    sent unchanged. `answer`: a type of `wire/`, or several.
    `events`: the type of a stream's events. `binary`: another media type that clients may accept.
    """
    content = {"application/json": {"schema": schema_of(answer)}}
    if events is not None:
        event = {"contentMediaType": "application/json", "contentSchema": schema_of(events)}
        content["text/event-stream"] = {"schema": {"type": "string"} | event}
    if binary is not None:
        content[binary] = {"schema": BINARY}
    return {200: {"content": content}}


def future(operation: Operation) -> dict[str, str]:
    """The answer to the submit of an operation."""
    body = {"request_id": operation.request_id}
    model_id = operation.reply.get("model_id", operation.model_id)
    if model_id:
        body["model_id"] = model_id
    return body


def xorl_name(run: Row, requested: Dialect | None) -> str | None:
    """What xorl's clients call a run, for answers to them; None for other clients. A request that shows no
    dialect is answered in that of the run."""
    return (run.alias or run.id) if (requested or run.dialect) == "xorl" else None
