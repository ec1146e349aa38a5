"""A file that names the operations that the engine is computing.

When the engine has died, the server reads it to learn which operations it was computing. What is written to a
file outlives its process, however that ends.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from . import messages


class UnderWay:
    """The file; `path` None: nothing is written."""

    def __init__(self, path: str | None):
        self._file = None if path is None else os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        self._noted: tuple[str, ...] = ()

    def note(self, requests: Iterable[messages.ToEngine]) -> None:
        """Write that these operations are being computed; none: the engine waits."""
        if self._file is None:
            return
        lines = tuple(f"{request.request_id}\t{getattr(request, 'model_id', '')}\n" for request in requests)
        if lines != self._noted:
            self._noted = lines
            os.pwrite(self._file, "".join(lines).encode() + b"\0", 0)
