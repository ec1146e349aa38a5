"""How the server's own client bears being told to wait."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from sqlalchemy.exc import OperationalError

from ...errors import ApiError

T = TypeVar("T")
_UNREADABLE_SECONDS = 5.0


async def patiently(ask: Callable[[], Awaitable[T]]) -> T:
    """Again later, as clients do, while the server says so."""
    while True:
        try:
            return await ask()
        except ApiError as error:
            if error.final:
                raise
            seconds = float(error.headers.get("Retry-After", 1))
        except OperationalError:  # the ledger cannot be read
            seconds = _UNREADABLE_SECONDS
        await asyncio.sleep(seconds)
