"""Saves that were refused for want of room, and that nobody sends again.

A client sends such a save again for some minutes and then gives it up, and the operations after it would wait
for its number. A save changes no model, so once it is not sent again its number is used up and they run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from ..errors import ApiError


class RefusedSaves:
    """`consume(owner, model_id, seq_id, message)` uses a number up unless its save was accepted meanwhile."""

    def __init__(self, consume: Callable[[str, str, int, str], Awaitable[None]], patience_seconds: float):
        self._consume = consume
        self._patience_seconds = patience_seconds
        self._timers: dict[tuple[str, int], asyncio.TimerHandle] = {}
        self._consuming: set[asyncio.Task[None]] = set()

    def refused(self, owner: str, model_id: str, seq_id: int, message: str) -> None:
        """Now, for the first time or again."""
        known = self._timers.pop((model_id, seq_id), None)
        if known is not None:
            known.cancel()
        self._timers[model_id, seq_id] = asyncio.get_running_loop().call_later(
            self._patience_seconds, self._give_up, owner, model_id, seq_id, message
        )

    def _give_up(self, owner: str, model_id: str, seq_id: int, message: str) -> None:
        del self._timers[model_id, seq_id]
        task = asyncio.ensure_future(self._use_up(owner, model_id, seq_id, message))
        self._consuming.add(task)
        task.add_done_callback(self._consuming.discard)

    async def _use_up(self, owner: str, model_id: str, seq_id: int, message: str) -> None:
        try:
            await self._consume(owner, model_id, seq_id, message)
        except ApiError:  # the ledger cannot be written now
            self.refused(owner, model_id, seq_id, message)

    def close(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
