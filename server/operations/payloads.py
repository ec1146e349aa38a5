"""The messages of operations to the engine: written before the operation is accepted, read when it is sent.

Operations that wait hold no payload in memory. The newest payloads are remembered, up to a bound, so that
what is sent as soon as it was accepted is not read again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Connection

from ..errors import Unavailable
from ..ledger import payloads as rows
from ..ledger.ledger import Ledger
from ..ledger.payloads import PayloadFiles, Stored

log = logging.getLogger("tinsmith.operations")
T = TypeVar("T")

INLINE_BYTES = 8 << 10
"""Payloads of up to so many bytes are in their row of the ledger."""
_REMEMBERED_BYTES = 16 << 20
_MOVED_BYTES = 8 << 20  # in one change


class Payloads:
    """Writes, reads and forgets payloads, in the ledger and in files beside it."""

    def __init__(
        self, ledger: Ledger, folder: Path, sync: bool = False, remembered_bytes: int = _REMEMBERED_BYTES
    ):
        """`folder` has the files of all ledgers, those of each in a folder of its own."""
        self._ledger = ledger
        self._files = PayloadFiles(folder / ledger.id, sync)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="payloads")
        self._remembered: OrderedDict[str, bytes] = OrderedDict()
        self._remembered_bytes = 0
        self._max_bytes = remembered_bytes

    # --- writing

    async def store(
        self, stream: str, request_id: str, payload: bytes, inline: bool, before: Callable[[], bool]
    ) -> Stored | None:
        """Write the payload of an operation that is about to be accepted. Payloads of one `stream`, which is
        a model's id, or the kind of operations without a model, are forgotten together.

        `before` is called in a thread; if it returns False the operation was accepted earlier, and None is
        returned. `inline`: it stays in the ledger, however large it is. Raises what `before` raises,
        StorageFull and Unavailable.
        """
        if len(payload) <= self._max_bytes:
            self._remembered[request_id] = payload
            self._remembered_bytes += len(payload)
            while self._remembered_bytes > self._max_bytes:
                _id, oldest = self._remembered.popitem(last=False)
                self._remembered_bytes -= len(oldest)
        if inline or len(payload) <= INLINE_BYTES:
            return Stored(len(payload), payload)

        def append() -> Stored | None:
            return self._files.append(stream, payload) if before() else None

        try:
            return await self._in_thread(append)
        except OSError as error:
            log.error("a payload cannot be written: %s", error)
            raise Unavailable(
                "the ledger cannot be written at the moment; nothing was accepted, try again"
            ) from error

    async def settled(self, stored: Stored, is_committed: bool) -> None:
        """Note whether a payload's row was committed; it is not if the operation was accepted before."""
        if stored.file is None:
            return
        if is_committed:
            self._files.committed(stored)
        else:
            await self._in_thread(partial(self._files.abandoned, stored))

    # --- reading

    async def load(self, request_id: str) -> bytes | None:
        """Return the payload of an operation; None if none is kept.

        Raises PayloadLost for one that cannot be read any more; ApiError, SQLAlchemyError or OSError
        otherwise.
        """
        known = self._remembered.get(request_id)
        if known is not None:
            return known

        def read() -> bytes | None:
            stored = self._ledger.read_now(rows.find, request_id)
            return None if stored is None else self._files.read(stored)

        return await self._in_thread(read)

    def remembered(self, request_id: str) -> bytes | None:
        """Return the payload, if it is in memory."""
        return self._remembered.get(request_id)

    def forget(self, request_id: str) -> None:
        """Drop a payload from memory, because it is not needed any more or was replaced."""
        known = self._remembered.pop(request_id, None)
        self._remembered_bytes -= len(known or b"")

    # --- the end of payloads

    def seal(self, stream: str) -> None:
        """Begin a new file for the stream, so that the old one can be removed by itself."""
        self._files.seal(stream)

    async def forget_through(self, model_id: str, seq_id: int) -> None:
        """Forget the model's payloads up to that number, which no replay needs any more."""
        await self._repeat(partial(rows.forget, model_id=model_id, through=seq_id))
        await self.remove_unused()

    async def forget_ended_models(self) -> None:
        await self._repeat(rows.forget_ended_models)

    async def remove_unused(self) -> int:
        """Remove files that are not needed, also those that a kill has left; return their bytes."""
        used = partial(self._ledger.read_now, rows.files)
        return await self._in_thread(partial(self._files.remove_unused, used))

    def used_bytes(self) -> int:
        """Return the total size of the files, in bytes."""
        return self._files.used_bytes()

    async def _repeat(self, change: Callable[[Connection], bool]) -> None:
        """Call `change`, which does one part at a time, until it is done; other writers come in between."""
        while await self._ledger.write(change):
            await asyncio.sleep(0)

    # --- older ledgers

    async def move_old(self, inline: frozenset[str]) -> int:
        """Move payloads here that are still in their operations' rows; return how many.

        A kill in between leaves each payload in one of the two places, and the next start goes on.
        """
        moved, last = 0, ""
        if not await self._ledger.read(rows.any_in_operations):
            return moved
        while old := await self._ledger.read(rows.in_operations, after=last, max_bytes=_MOVED_BYTES):
            stored: list[Stored] = []
            for row in old:
                if len(row.payload) <= INLINE_BYTES or row.kind in inline:
                    stored.append(Stored(len(row.payload), row.payload))
                else:
                    stream = row.model_id or row.kind
                    stored.append(await self._in_thread(partial(self._files.append, stream, row.payload)))

            def change(connection: Connection, old=old, stored=stored) -> None:
                for row, each in zip(old, stored, strict=True):
                    rows.move(connection, row, each)

            await self._ledger.write(change)
            for each in stored:
                self._files.committed(each)
            moved, last = moved + len(old), old[-1].id
        return moved

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)

    def close(self) -> None:
        self._threads.shutdown()
