"""How routes get the objects that they use: by type, from what `create_app` has put together.

A parameter `runs: Provided[Runs]` of a route is the application's `Runs`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING, Annotated, TypeVar

from fastapi import Depends, Request

T = TypeVar("T")


class Services:
    """The objects of one application, by type. They are added when it starts."""

    def __init__(self) -> None:
        self._by_type: dict[type, object] = {}

    def add(self, objects: Iterable[object]) -> None:
        for each in objects:
            self._by_type[type(each)] = each

    def __getitem__(self, kind: type[T]) -> T:
        found = self._by_type[kind]
        assert isinstance(found, kind)
        return found


def provided(request: Request, kind: type[T]) -> T:
    """Return the application's object of this type."""
    services: Services = request.app.state.services
    return services[kind]


if TYPE_CHECKING:
    Provided = Annotated[T, "an object of the application"]
else:

    class Provided:
        def __class_getitem__(cls, kind: type[T]) -> object:
            return Annotated[kind, Depends(_provider(kind))]


@cache
def _provider(kind: type[T]) -> Callable[[Request], Awaitable[T]]:
    # A coroutine: FastAPI runs plain functions in a thread, which costs every request two switches.
    async def provide(request: Request) -> T:
        return provided(request, kind)

    return provide
