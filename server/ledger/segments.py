"""Files of payloads, one after the other, each payload written once and never changed.

Every stream of payloads, such as those of one model, has files of its own. A payload is in its file before
the row that points to it is committed, so what a kill leaves behind is at most bytes that no row points to. A
file that no row points into any more is removed as a whole: forgetting payloads writes nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ApiError, StorageFull
from .payloads import Stored

SEGMENT_BYTES = 64 << 20
_IDLE_SECONDS = 60.0
_SUFFIX = ".payloads"


class PayloadLost(ApiError):
    """A file is gone or damaged."""


@dataclass
class _Open:
    """The file that a stream's payloads go to at present."""

    name: str
    size: int = 0
    used_at: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)
    sealed: bool = False


class Segments:
    """The files in `folder`, which is made when it is needed. Safe to use from any thread.

    `sync`: a payload is on the disk before `append` returns, and so survives a loss of power.
    """

    def __init__(self, folder: Path, sync: bool = False):
        self._folder = folder
        self._sync = sync
        self._lock = threading.Lock()
        self._open: dict[str, _Open] = {}
        self._uncommitted: Counter[str] = Counter()

    def append(self, stream: str, payload: bytes) -> Stored:
        """Write a payload. The caller says afterwards that it was `committed` or `abandoned`.

        Raises StorageFull, and OSError for other faults of the disk; nothing is left of it then.
        """
        while True:
            with self._lock:
                segment = self._open.setdefault(stream, _Open(uuid.uuid4().hex + _SUFFIX))
                self._uncommitted[segment.name] += 1
            try:
                with segment.lock:
                    if not segment.sealed:
                        position = self._write(segment, payload)
                        break
            except BaseException:
                self._done(segment.name)
                raise
            self._done(segment.name)  # it was sealed in between: the next one
        if segment.size >= SEGMENT_BYTES:
            self.seal(stream)
        return Stored(len(payload), segment=segment.name, position=position, checksum=zlib.crc32(payload))

    def _write(self, segment: _Open, payload: bytes) -> int:
        path, position, is_new = self._folder / segment.name, segment.size, segment.size == 0
        if is_new:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            left = memoryview(payload)
            while left:
                left = left[os.pwrite(descriptor, left, segment.size + len(payload) - len(left)) :]
            if self._sync:
                os.fsync(descriptor)
                if is_new:
                    self._sync_folder()
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, position)
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise StorageFull(
                    "the server's disk is full; nothing was accepted, try again later"
                ) from error
            raise
        finally:
            os.close(descriptor)
        segment.size += len(payload)
        segment.used_at = time.monotonic()
        return position

    def _sync_folder(self) -> None:
        descriptor = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def read(self, stored: Stored) -> bytes:
        """Raises PayloadLost, and OSError for faults of the disk."""
        if stored.data is not None:
            return stored.data
        assert stored.segment is not None
        try:
            with (self._folder / stored.segment).open("rb") as file:
                file.seek(stored.position or 0)
                payload = file.read(stored.size)
        except FileNotFoundError as error:
            raise PayloadLost(f"the file of payloads {stored.segment} is gone") from error
        if len(payload) != stored.size or zlib.crc32(payload) != stored.checksum:
            raise PayloadLost(f"the file of payloads {stored.segment} is damaged")
        return payload

    def committed(self, stored: Stored) -> None:
        """A row points to it."""
        if stored.segment is not None:
            self._done(stored.segment)

    def abandoned(self, stored: Stored) -> None:
        """No row will point to it. Its room is given back if nothing was written after it."""
        if stored.segment is None:
            return
        with self._lock:
            segment = next((each for each in self._open.values() if each.name == stored.segment), None)
        if segment is not None:
            with segment.lock, contextlib.suppress(OSError):
                assert stored.position is not None
                if not segment.sealed and segment.size == stored.position + stored.size:
                    os.truncate(self._folder / segment.name, stored.position)
                    segment.size = stored.position
        self._done(stored.segment)

    def _done(self, name: str) -> None:
        with self._lock:
            self._uncommitted[name] -= 1
            if not self._uncommitted[name]:
                del self._uncommitted[name]

    def seal(self, stream: str) -> None:
        """What the stream has next goes to a new file, so that the old one can be removed by itself."""
        with self._lock:
            segment = self._open.pop(stream, None)
        if segment is not None:
            with segment.lock:
                segment.sealed = True

    def remove_unused(self, used: Callable[[], set[str]]) -> int:
        """Remove the files that no row points into, and return their bytes. `used` reads the ledger."""
        now = time.monotonic()
        with self._lock:
            idle = [stream for stream, each in self._open.items() if now - each.used_at > _IDLE_SECONDS]
        for stream in idle:
            self.seal(stream)
        with self._lock:
            busy = {each.name for each in self._open.values()} | set(self._uncommitted)
        # In this order: no row comes to point into a sealed file.
        candidates = [path for path in self._folder.glob(f"*{_SUFFIX}") if path.name not in busy]
        if not candidates:
            return 0
        needed = used()
        removed = 0
        for path in candidates:
            if path.name not in needed:
                with contextlib.suppress(FileNotFoundError):
                    removed += path.stat().st_size
                    path.unlink()
        return removed

    def used_bytes(self) -> int:
        total = 0
        for path in self._folder.glob(f"*{_SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):
                total += path.stat().st_size
        return total
