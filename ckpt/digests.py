"""CRC-32 of a finished directory's files, kept beside them, so that damaged ones are not taken for whole.

Array stores check what they compress or index, but not every byte: a flipped bit may come back as a weight.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

FILE = ".digests.json"
"""Hidden: it goes along in no download."""
_CHUNK_BYTES = 1 << 20


class DamagedFiles(ValueError):
    """A directory's files are not as they were written."""


def write(directory: Path) -> None:
    """Of all files below the directory now."""
    (directory / FILE).write_text(json.dumps(_digests(directory)))


def check(directory: Path) -> None:
    """Raises DamagedFiles. A directory without digests (its write was cut short after the files, or an older
    version wrote it) is taken as it is."""
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
