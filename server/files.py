"""Files of the server: free room on the disk, private files, and headers of safetensors.

Some of the disk is kept in reserve, so that the answers of accepted operations can still be written. Submits
that need room are refused with 507 before the disk is full, and accepted again when something was deleted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .errors import StorageFull

_FRESH_SECONDS = 0.25  # many submits at once ask the file system once
_LOOK_SECONDS = 1.0


class Disk:
    """The free room on the data directory's disk. Safe to use from any thread."""

    def __init__(self, data_dir: Path, reserve_bytes: int, ledger_dir: Path | None = None):
        """`ledger_dir`: where the ledger is, if it is on another disk."""
        self._folders = [data_dir] if ledger_dir is None else [data_dir, ledger_dir]
        self.reserve_bytes = reserve_bytes
        self._asked_at = float("-inf")
        self.has_room_until = float("-inf")  # of time.monotonic: `require_room` need not be called before
        self._usage = (0, 0)

    def usage(self) -> tuple[int, int]:
        """Return the total and free bytes, of the fuller disk if there are two. Raises OSError."""
        now = time.monotonic()
        if now - self._asked_at > _FRESH_SECONDS:
            usages = [shutil.disk_usage(folder) for folder in self._folders]
            fullest = min(usages, key=lambda usage: usage.free)
            self._usage, self._asked_at = (fullest.total, fullest.free), now
        return self._usage

    def require_room(self) -> None:
        """Raise StorageFull if only the reserve is left."""
        _total, free = self.usage()
        if free < self.reserve_bytes:
            raise StorageFull(
                f"the server's disk has {free >> 20} MiB left, of which {self.reserve_bytes >> 20} MiB are "
                "kept in reserve; nothing was accepted; send it again when there is room"
            )
        self.has_room_until = max(self.has_room_until, self._asked_at + _FRESH_SECONDS)

    async def watch_forever(self) -> None:
        """Look at the disk regularly, so that no submit has to wait for the file system."""
        while True:
            try:
                await asyncio.to_thread(self.require_room)
                self.has_room_until = self._asked_at + 3 * _LOOK_SECONDS
            except (StorageFull, OSError):
                self.has_room_until = float("-inf")  # each submit looks for itself
            await asyncio.sleep(_LOOK_SECONDS)


# --- files that only the server's user can read, whatever the umask says

_FILE, _DIRECTORY = 0o600, 0o700


def read_or_create(file: Path, make: Callable[[], bytes]) -> bytes:
    """Return the file's content, creating the file with `make()` if it is missing."""
    if not file.exists():
        made = file.with_name(f"{file.name}.tmp-{os.getpid()}")
        made.unlink(missing_ok=True)
        descriptor = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _FILE)
        with os.fdopen(descriptor, "wb") as written:
            written.write(make())
            written.flush()
            os.fsync(written.fileno())
        os.replace(made, file)
    return file.read_bytes()


def make_directory(directory: Path) -> None:
    """Create the directory if it is missing. An existing one keeps its mode: its owner may share it."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(_DIRECTORY)
        directory.chmod(_DIRECTORY)
    except FileExistsError:
        directory.mkdir(exist_ok=True)  # raises if it is a file


def protect(file: Path, *beside: Path) -> None:
    """Create an empty file if it is missing; take it, and the files beside it, away from other users.

    Errors are ignored here: opening the file will report them.
    """
    with contextlib.suppress(OSError):
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _FILE))
    for each in (file, *beside):
        with contextlib.suppress(OSError):  # the file is missing, or another user's
            if each.stat().st_mode & 0o077:
                each.chmod(_FILE)


# --- headers of safetensors

_MAX_HEADER_BYTES = 32 << 20


class Entry(NamedTuple):
    """One tensor of a file. `dtype` is spelled as in the format: F32, BF16, F8_E4M3, ..."""

    dtype: str
    shape: tuple[int, ...]


def header(file: Path) -> dict[str, Any]:
    """Read the header of a file. Raises ValueError for a file without one, and OSError."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 2 <= length <= _MAX_HEADER_BYTES:
            raise ValueError(f"{file.name} is not safetensors: its header would have {length} bytes")
        try:
            read = json.loads(opened.read(length))
        except (ValueError, RecursionError) as error:
            reason = f"{file.name} has a header that is not JSON: {str(error)[:200]}"
            raise ValueError(reason) from None
    if not isinstance(read, dict):
        raise ValueError(f"{file.name} has a header that is not a JSON object")
    return read


def tensor_entries(path: Path) -> dict[str, Entry]:
    """Read the tensors of a file, or of all files of a folder, by name. Raises ValueError and OSError."""
    found: dict[str, Entry] = {}
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        for name, described in header(file).items():
            if name == "__metadata__":
                continue
            try:
                found[name] = Entry(str(described["dtype"]), tuple(int(size) for size in described["shape"]))
            except (KeyError, TypeError, ValueError):
                raise ValueError(f"{file.name} does not say what {name[:192]!r} is") from None
    return found
