"""A body that is too long is answered 413 before it is parsed."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import asynccontextmanager

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import error_response

# The bodies of all other routes describe something: names, paths, metadata.
USUAL_BYTES = 1 << 20
# Prompts: the longest contexts there are, and the tokens whose log-probs are asked for at each place of one.
SAMPLING_BYTES = 16 << 20
SMALL_BYTES = 1 << 20
_OF_OWNER, _OF_ALL = 2, 8  # times the longest body
_TRAINING = ("/api/v1/forward_backward", "/api/v1/forward")
_SAMPLING = (
    *("/api/v1/asample", "/api/v1/sample"),
    *("/generate", "/v1/completions", "/v1/chat/completions"),
)


def of_training_and_sampling(max_body_bytes: int) -> dict[str, int]:
    """Bytes that the bodies of these routes may have, by path; training may take as much as any body."""
    own = dict.fromkeys(_TRAINING, max_body_bytes)
    return own | dict.fromkeys(_SAMPLING, min(SAMPLING_BYTES, max_body_bytes))


class Budget:
    """The bytes of large bodies that are in memory at once, of one owner and of all. Others wait, unread."""

    def __init__(self, of_owner: int, of_all: int):
        self._of_owner = of_owner
        self._of_all = of_all
        self._taken: Counter[str] = Counter()
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def take(self, owner: str, size: int) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """Wait for so many bytes; they are given back at the end, or when the yielded function is called."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._has_room(owner, size))
            self._taken[owner] += size
        held = size

        async def give_back() -> None:
            nonlocal held
            async with self._changed:
                self._taken[owner] -= held
                held = 0
                self._taken += Counter()  # forgets owners without any
                self._changed.notify_all()

        try:
            yield give_back
        finally:
            await asyncio.shield(give_back())

    def _has_room(self, owner: str, size: int) -> bool:
        alone = not self._taken[owner]
        fits = self._taken[owner] + size <= self._of_owner
        return (alone or fits) and (not self._taken or self._taken.total() + size <= self._of_all)


def budget(max_body_bytes: int) -> Budget:
    return Budget(_OF_OWNER * max_body_bytes, _OF_ALL * max_body_bytes)


class BodyLimits:
    """ASGI middleware: bodies of at most `usual` bytes, and on some paths of as many as `own` says. Those of
    over `SMALL_BYTES` wait for their share of the `budget`, unless they go to disk as they come (`streamed`).
    """

    def __init__(
        self,
        app: ASGIApp,
        usual: int,
        own: Mapping[str, int],
        budget: Budget | None = None,
        streamed: Collection[str] = (),
    ):
        self._app = app
        self._usual = usual
        self._own = own
        self._budget = budget
        self._streamed = streamed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._own.get(scope["path"], self._usual)
        declared = HTTPConnection(scope).headers.get("content-length", "0")
        # At most 18 ASCII digits: str.isdigit takes '²' too, and int() no more than 4300 of them.
        is_number = declared.isascii() and declared.isdigit() and len(declared) <= 18
        if not is_number or int(declared) > limit:
            await _refuse(limit, scope, receive, send)
            return
        seen = 0
        over = False

        async def counted() -> Message:
            nonlocal seen, over
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                over = True
                return {"type": "http.disconnect"}
            return message

        async def guarded(message: Message) -> None:
            if not over:
                await send(message)

        size = int(declared) if int(declared) or not _is_chunked(scope) else limit
        try:
            if self._budget is None or size <= SMALL_BYTES or scope["path"] in self._streamed:
                await self._app(scope, counted, guarded)
            else:
                state = scope.setdefault("state", {})
                async with self._budget.take(state.get("owner", ""), size) as state["body_is_read"]:
                    await self._app(scope, counted, guarded)
        finally:
            if over:
                await _refuse(limit, scope, receive, send)


def _is_chunked(scope: Scope) -> bool:
    return "transfer-encoding" in HTTPConnection(scope).headers


async def _refuse(limit: int, scope: Scope, receive: Receive, send: Send) -> None:
    message = f"the body is over the limit of {limit} bytes"
    await error_response(scope["path"], 413, message, "user")(scope, receive, send)
