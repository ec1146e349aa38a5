"""Tools for routes: the objects that they use, common parameters, and parts of their answers.

A parameter `runs: Provided[Runs]` of a route is the application's `Runs`, which `create_app` has made.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args

from fastapi import Depends, Query, Request, params
from sqlalchemy import Row

from ..access import Caller
from ..dialect import Dialect, requested_dialect
from ..operations.operation import Operation
from ..settings import Settings
from .openapi import BINARY, schema_of

T = TypeVar("T")


class Services(dict[type, Any]):
    """The objects of one application, by type. They are added when it starts."""

    def add(self, objects: Iterable[object]) -> None:
        self.update({type(each): each for each in objects})

    if TYPE_CHECKING:

        def __getitem__(self, kind: type[T]) -> T: ...


def provided(request: Request, kind: type[T]) -> T:
    """Return the application's object of this type."""
    services: Services = request.app.state.services
    return services[kind]


class _Getter:
    """A dependency of FastAPI that needs nothing but the request."""

    def __init__(self, get: Callable[[Request], Any]):
        self.get = get

    async def __call__(self, request: Request) -> Any:  # FastAPI would run a plain function in a thread
        return self.get(request)


def from_request(get: Callable[[Request], Any]) -> Any:
    """Make the annotation of a route's parameter whose value `get` takes from the request."""
    return Depends(_Getter(get))


if TYPE_CHECKING:
    Provided = Annotated[T, "an object of the application"]
else:

    class Provided:
        def __class_getitem__(cls, kind: type[T]) -> object:
            return Annotated[kind, from_request(lambda request: request.app.state.services[kind])]


@dataclass(frozen=True)
class Parameters:
    """The parameters of a route's function: those made by `from_request`, with their getters, and its `own`.

    `request`: the name of the parameter that takes the request itself; empty if it has none.
    """

    getters: dict[str, Callable[[Request], Any]]
    own: list[inspect.Parameter]
    request: str


def parameters_of(endpoint: Callable[..., Any]) -> Parameters:
    getters, own, request = {}, [], ""
    for name, parameter in inspect.signature(endpoint, eval_str=True).parameters.items():
        found = [each for each in get_args(parameter.annotation)[1:] if isinstance(each, params.Depends)]
        if found and isinstance(found[0].dependency, _Getter):
            getters[name] = found[0].dependency.get
        else:
            own.append(parameter)
            if parameter.annotation is Request:
                request = name
    return Parameters(getters, own, request)


def resolved(endpoint: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Wrap a route's function so that FastAPI does not see the parameters made by `from_request`.

    FastAPI would resolve each of them as a dependency, which takes longer than the rest of some routes.
    """
    parameters = parameters_of(endpoint)
    getters, own, request = parameters.getters, parameters.own, parameters.request
    if not getters:
        return endpoint
    if not request:
        own = [*own, inspect.Parameter(_REQUEST, inspect.Parameter.KEYWORD_ONLY, annotation=Request)]

    @functools.wraps(endpoint)
    async def call(**values: Any) -> Any:
        from_there = values[request] if request else values.pop(_REQUEST)
        return await endpoint(**values, **{name: get(from_there) for name, get in getters.items()})

    signature = inspect.signature(endpoint, eval_str=True)
    call.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
    return call


_REQUEST = "_request"  # the request's parameter, for routes that declare none


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
    """Return the answer that a client gets when its operation is accepted: the id to poll."""
    body = {"request_id": operation.request_id}
    model_id = operation.reply.get("model_id", operation.model_id)
    if model_id:
        body["model_id"] = model_id
    return body


def xorl_name(run: Row, requested: Dialect | None) -> str | None:
    """Return what xorl's clients call a run; None for other clients.

    If the request shows no dialect, the dialect in which the run was created counts.
    """
    return (run.alias or run.id) if (requested or run.dialect) == "xorl" else None
