"""Directories that appear complete and flushed to disk, or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_directory(directory: Path) -> Iterator[Path]:
    """Give a new directory to write into, which becomes `directory` when the block ends without an exception.

    An existing directory of that name is replaced. A process that dies in between leaves `<name>.tmp-<uid>`,
    which the next write of the same name removes.
    """
    directory = Path(directory).absolute()
    directory.parent.mkdir(parents=True, exist_ok=True)
    for leftover in directory.parent.glob(f"{directory.name}.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    writing, replaced = (directory.with_name(f"{directory.name}.tmp-{uuid.uuid4().hex}") for _ in range(2))
    writing.mkdir()
    try:
        yield writing
        flush(writing)
        if directory.exists():
            os.replace(directory, replaced)
        os.replace(writing, directory)
        _fsync(directory.parent)
    finally:
        shutil.rmtree(writing, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def flush(directory: Path) -> None:
    """Force a finished directory, its files and its own name to the disk."""
    for path in [*directory.rglob("*"), directory, directory.parent]:
        _fsync(path)


def size_bytes(directory: Path) -> int:
    """Return the bytes of all files below a directory."""
    return sum(path.stat().st_size for path in Path(directory).rglob("*") if path.is_file())


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
