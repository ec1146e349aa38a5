"""What safetensors files say they hold, without their arrays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

_MAX_HEADER_BYTES = 32 << 20


class Entry(NamedTuple):
    """`dtype` as the format spells it: F32, BF16, F8_E4M3, ..."""

    dtype: str
    shape: tuple[int, ...]


def header(file: Path) -> dict[str, Any]:
    """The header as it stands. Raises ValueError for a file that has none, OSError."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 2 <= length <= _MAX_HEADER_BYTES:
            raise ValueError(f"{file.name} is not safetensors: its header would have {length} bytes")
        try:
            read = json.loads(opened.read(length))
        except (ValueError, RecursionError) as error:
            reason = f"{file.name} does not hold JSON where it should: {str(error)[:200]}"
            raise ValueError(reason) from None
    if not isinstance(read, dict):
        raise ValueError(f"{file.name} does not hold an object where it should")
    return read


def entries(path: Path) -> dict[str, Entry]:
    """By name, of a file or of all those of a folder. Raises ValueError, OSError."""
    found: dict[str, Entry] = {}
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        for name, said in header(file).items():
            if name == "__metadata__":
                continue
            try:
                found[name] = Entry(str(said["dtype"]), tuple(int(size) for size in said["shape"]))
            except (KeyError, TypeError, ValueError):
                raise ValueError(f"{file.name} does not say what {name[:192]!r} is") from None
    return found
