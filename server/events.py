"""Events, by which objects react to others without knowing them, and tasks in the background."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Event(list[Callable[P, None]], Generic[P]):
    """Something that happens repeatedly, and its listeners. Its owner calls it, and the call reaches all
    listeners in the order in which they subscribed, usually at construction. What happens with every
    operation calls the listeners itself: `for listener in event: listener(thing)`."""

    def subscribe(self, listener: Callable[P, None]) -> None:
        """Call `listener` from now on."""
        self.append(listener)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> None:
        for listener in self:
            listener(*args, **kwargs)


class EventByKind(dict[str, list[Callable[[T], None]]], Generic[T]):
    """An event that happens to things of several kinds, with the listeners to each kind. Its owner calls
    those of the thing's kind: `for listener in event[kind]: listener(thing)`."""

    def __init__(self) -> None:
        super().__init__()
        self._subscribed: list[tuple[Callable[[T], None], tuple[str, ...]]] = []

    def subscribe(self, listener: Callable[[T], None], *kinds: str) -> None:
        """Call `listener` from now on; without `kinds`, for things of any kind."""
        self._subscribed.append((listener, kinds))
        self.clear()

    def __missing__(self, kind: str) -> list[Callable[[T], None]]:
        """Collect the listeners to a kind, in the order in which they subscribed."""
        self[kind] = [listener for listener, kinds in self._subscribed if not kinds or kind in kinds]
        return self[kind]


class Tasks:
    """Work that an object does in the background, until it is done or the object is closed."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[None]] = set()

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def close(self) -> None:
        """Cancel what is not done, and wait until it has ended."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
