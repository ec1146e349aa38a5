"""A file that says what the engine computes at the moment.

The server reads it when the engine has died, to know which operations it died of. What is written to a file
outlives the process that wrote it, however that process ends.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from . import messages


class UnderWay:
    """`path` None: nobody wants to know."""

    def __init__(self, path: str | None):
        self._file = None if path is None else os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        self._noted: tuple[str, ...] = ()

    def note(self, requests: Iterable[messages.ToEngine]) -> None:
        """From now on these are computed; none: the engine waits."""
        if self._file is None:
            return
        lines = tuple(f"{request.request_id}\t{getattr(request, 'model_id', '')}\n" for request in requests)
        if lines != self._noted:
            self._noted = lines
            os.pwrite(self._file, "".join(lines).encode() + b"\0", 0)
