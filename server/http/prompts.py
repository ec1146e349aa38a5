"""Text prompts into tokens, beside the event loop, and never more text than a model can read.

Work that a client waits for ends when the client closes its connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request

from ..errors import ClientGone, ContextTooLong
from ..offload import Offload
from ..text import conversations
from ..text.tokenizer import ChatTokenizer

_INLINE_CHARACTERS = 4096  # tokenized within a millisecond or two
_CHARACTERS_PER_TOKEN = 8  # more than texts have, on the average; runs of spaces may
_GROWTH = 4


class Prompts:
    """The prompts of one request as tokens, of a model whose context has `limit` of them."""

    def __init__(self, offload: Offload, owner: str, tokenizer: ChatTokenizer, limit: int):
        self._offload = offload
        self._owner = owner
        self._tokenizer = tokenizer
        self._limit = limit

    async def of(self, prompt: str | list[int]) -> list[int]:
        """Tokens stay as they are. Raises ContextTooLong, or BadRequest for a text that cannot be written."""
        if not isinstance(prompt, str):
            return prompt
        if len(prompt) <= _INLINE_CHARACTERS:
            return self._tokenizer.encode(prompt)
        return await self._offload.in_thread(
            self._owner, tokens_within, self._tokenizer.encode, prompt, self._limit
        )

    async def of_conversation(self, turns: list[dict[str, Any]], /, **variables: Any) -> list[int]:
        """Raises BadRequest for one that is too long, or that the chat template does not take."""

        def tokens() -> list[int]:
            text = conversations.written(self._tokenizer, turns, **variables)
            return tokens_within(self._tokenizer.encode_written, text, self._limit, "messages")

        return await self._offload.in_thread(self._owner, tokens)


def tokens_within(
    encode: Callable[[str], list[int]], text: str, limit: int, where: str = "prompt"
) -> list[int]:
    """The text's tokens. Raises ContextTooLong where they are more than `limit`, and soon for a very long
    text: its beginning is tokenized first, and mostly is too long already."""
    beginning = _CHARACTERS_PER_TOKEN * (limit + 1)
    while beginning < len(text):
        # The last token may go on behind the cut, and then be a few that are merged there.
        if len(encode(text[:beginning])) > limit + _CHARACTERS_PER_TOKEN * _GROWTH:
            raise ContextTooLong(
                f"{where}: a text of {len(text)} characters has more tokens than the model's limit of {limit}"
            )
        beginning *= _GROWTH
    return encode(text)


T = TypeVar("T")


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns, or cancel it when the client closes the connection.

    The body has to be read before. Raises ClientGone.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone("the client closed its connection")
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
