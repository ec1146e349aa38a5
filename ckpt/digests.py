"""CRC-32 checksums of a finished directory's files, stored beside them to detect damage.

Array stores check compressed data and indexes, but not every byte, so a flipped bit could be read as a
weight.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

FILE = ".digests.json"
"""Hidden, so that downloads leave it out."""
_CHUNK_BYTES = 1 << 20


class DamagedFiles(ValueError):
    """The files of a directory differ from what was written."""


def write(directory: Path) -> None:
    """Write the checksums of all files that are below the directory now."""
    (directory / FILE).write_text(json.dumps(_digests(directory)))


def check(directory: Path) -> None:
    """Compare a directory's files with their checksums. Raises DamagedFiles.

    A directory without checksums passes: an older version wrote it, or its write ended after the files."""
    if not (directory / FILE).is_file():
        return
    try:
        expected = json.loads((directory / FILE).read_text())
    except ValueError:
        raise DamagedFiles(f"{directory.name}: {FILE} is damaged") from None
    found = _digests(directory)
    damaged = sorted(name for name in expected if found.get(name) != expected[name])
    if damaged:
        raise DamagedFiles(f"{directory.name}: {len(damaged)} files are damaged, the first is {damaged[0]}")


def _digests(directory: Path) -> dict[str, int]:
    files = (path for path in directory.rglob("*") if path.is_file() and path != directory / FILE)
    return {path.relative_to(directory).as_posix(): _crc32(path) for path in files}


def _crc32(path: Path) -> int:
    digest = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest = zlib.crc32(chunk, digest)
    return digest
