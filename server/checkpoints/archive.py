"""A directory's files as a tar that is written while it is sent."""

from __future__ import annotations

import asyncio
import os
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO

_CHUNK_BYTES = 1 << 20
COMPLETE = "checkpoint_complete"
"""An empty last file: clients take an archive without it for one that was cut off."""


def files(directory: Path) -> dict[str, Path]:
    """The plain files below a directory by their names in it, in order; hidden ones are the server's own."""
    found = (path for path in directory.rglob("[!.]*") if path.is_file() and not path.is_symlink())
    return {path.relative_to(directory).as_posix(): path for path in sorted(found)}


class Archive:
    """The files are opened at once: one that is deleted meanwhile is sent to its end.

    `length`: the tar's bytes. Raises FileNotFoundError.
    """

    def __init__(self, directory: Path):
        self._parts: list[tuple[bytes, BinaryIO | None, int]] = []
        for name, path in files(directory).items():
            file = path.open("rb")
            status = os.fstat(file.fileno())
            self._parts.append((_header(name, status.st_size, status.st_mtime), file, status.st_size))
        if not self._parts:
            raise FileNotFoundError(directory)
        self._parts.append((_header(COMPLETE, 0, 0.0), None, 0))
        content = sum(len(header) + size + _padding(size) for header, _file, size in self._parts)
        self._end = 2 * tarfile.BLOCKSIZE
        self.length = content + self._end

    async def chunks(self) -> AsyncIterator[bytes]:
        try:
            for header, file, size in self._parts:
                yield header
                left = size
                while file is not None and left:
                    chunk = await asyncio.to_thread(file.read, min(left, _CHUNK_BYTES))
                    if not chunk:
                        raise OSError(f"{file.name} is shorter than it was")
                    left -= len(chunk)
                    yield chunk
                if _padding(size):
                    yield bytes(_padding(size))
            yield bytes(self._end)
        finally:
            for _, open_file, _ in self._parts:
                if open_file is not None:
                    open_file.close()


def _header(name: str, size: int, modified_at: float) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = size, int(modified_at), 0o644
    return info.tobuf(tarfile.PAX_FORMAT)


def _padding(size: int) -> int:
    return -size % tarfile.BLOCKSIZE
