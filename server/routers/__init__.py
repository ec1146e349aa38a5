"""The HTTP routes, a few lines each: body in, one call to the backend, answer out."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Query, Request

from ..auth import Caller
from ..backend import Backend
from ..operation import Operation

# Coroutines: FastAPI runs plain functions in a thread, which costs every request two switches.


async def _backend(request: Request) -> Backend:
    return request.app.state.backend


async def _owner(request: Request) -> str:
    return request.state.owner


async def _caller(request: Request) -> Caller:
    return request.state.caller


BackendOf = Annotated[Backend, Depends(_backend)]
Owner = Annotated[str, Depends(_owner)]
CallerOf = Annotated[Caller, Depends(_caller)]

# Of a page of a listing.
Limit = Annotated[int, Query(ge=0, le=1000)]
Offset = Annotated[int, Query(ge=0, le=1 << 31)]


def future(operation: Operation) -> dict[str, str]:
    """The answer to the submit of an operation."""
    body = {"request_id": operation.request_id}
    if operation.model_id:
        body["model_id"] = operation.model_id
    return body
