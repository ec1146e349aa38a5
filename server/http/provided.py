"""How routes get the objects that they use: by type, from what `create_app` has put together.

A parameter `runs: Provided[Runs]` of a route is the application's `Runs`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args

from fastapi import Depends, Request, params

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


def resolved(endpoint: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Wrap a route's function so that FastAPI does not see the parameters made by `from_request`.

    FastAPI would resolve each of them as a dependency, which takes longer than the rest of some routes.
    """
    signature = inspect.signature(endpoint, eval_str=True)
    getters, own, request = {}, [], ""
    for name, parameter in signature.parameters.items():
        found = [each for each in get_args(parameter.annotation)[1:] if isinstance(each, params.Depends)]
        if found and isinstance(found[0].dependency, _Getter):
            getters[name] = found[0].dependency.get
        else:
            own.append(parameter)
            if parameter.annotation is Request:
                request = name
    if not getters:
        return endpoint
    if not request:
        own.append(inspect.Parameter(_REQUEST, inspect.Parameter.KEYWORD_ONLY, annotation=Request))

    @functools.wraps(endpoint)
    async def call(**values: Any) -> Any:
        from_there = values[request] if request else values.pop(_REQUEST)
        return await endpoint(**values, **{name: get(from_there) for name, get in getters.items()})

    call.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
    return call


_REQUEST = "_request"  # the parameter of routes that have none for the request themselves
