"""How much room there is on the disk of the data directory.

Some of it is kept in reserve: what is accepted while there is more can still be answered, and its answer be
written, when there is less. Submits that need room are refused before the disk is full, with 507, and are
welcome again when something was deleted.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from .errors import StorageFull

_FRESH_SECONDS = 0.25  # a crowd of submits asks the file system once


class Disk:
    """Safe to use from any thread."""

    def __init__(self, data_dir: Path, reserve_bytes: int, ledger_dir: Path | None = None):
        """`ledger_dir`: where the ledger is, if that is elsewhere."""
        self._folders = [data_dir] if ledger_dir is None else [data_dir, ledger_dir]
        self.reserve_bytes = reserve_bytes
        self._asked_at = float("-inf")
        self._usage = (0, 0)

    def usage(self) -> tuple[int, int]:
        """Total and free bytes, of the fuller disk if there are two. Raises OSError."""
        now = time.monotonic()
        if now - self._asked_at > _FRESH_SECONDS:
            usages = [shutil.disk_usage(folder) for folder in self._folders]
            fullest = min(usages, key=lambda usage: usage.free)
            self._usage, self._asked_at = (fullest.total, fullest.free), now
        return self._usage

    def require_room(self) -> None:
        """Raises StorageFull."""
        _total, free = self.usage()
        if free < self.reserve_bytes:
            raise StorageFull(
                f"the server's disk has {free >> 20} MiB left, of which {self.reserve_bytes >> 20} MiB are "
                "kept in reserve; nothing was accepted, and it can be sent again when there is room"
            )
