"""Files that only the server's user can read, whatever the umask says: the ledger and secrets."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

_FILE, _DIRECTORY = 0o600, 0o700


def read_or_create(file: Path, make: Callable[[], bytes]) -> bytes:
    """The file's content, which is made first if there is no file."""
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
    """Make the directory if it is missing. One that is there keeps its mode: its owner may share it."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(_DIRECTORY)
        directory.chmod(_DIRECTORY)
    except FileExistsError:
        directory.mkdir(exist_ok=True)  # raises if it is no directory


def protect(file: Path, *beside: Path) -> None:
    """Make an empty file if it is missing; take it, and those beside it, away from other users.

    What cannot be made here is left to whoever opens the file to complain of.
    """
    with contextlib.suppress(OSError):
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _FILE))
    for each in (file, *beside):
        with contextlib.suppress(OSError):  # it is missing, or another user's
            if each.stat().st_mode & 0o077:
                each.chmod(_FILE)
