"""Runs `tinsmith` with the given arguments, and notes which named functions of the server are called.

SIGUSR1 begins a list, and SIGUSR2 writes it to the file named by TRACE: one JSON list of `[file, function]`
pairs, in the order of the first calls, from every thread.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

import tinsmith.server
from tinsmith.server.cli import app

SERVER = f"{Path(tinsmith.server.__file__).parent}/"


class Trace:
    """The functions that were called since `begin`."""

    def __init__(self, path: Path):
        self._path = path
        self._called: dict[tuple[str, str], None] | None = None

    def note(self, frame: FrameType, event: str, _argument: object) -> None:
        called, code = self._called, frame.f_code
        if called is None or event != "call" or code.co_name[0] == "<":  # comprehensions and lambdas
            return
        if code.co_filename.startswith(SERVER):
            called.setdefault((code.co_filename.removeprefix(SERVER), code.co_qualname))

    def begin(self, *_signal: object) -> None:
        self._called = {}

    def end(self, *_signal: object) -> None:
        called, self._called = self._called, None
        written = self._path.with_suffix(".new")
        written.write_text(json.dumps(list(called or ())))
        written.rename(self._path)


if __name__ == "__main__":
    trace = Trace(Path(os.environ["TRACE"]))
    signal.signal(signal.SIGUSR1, trace.begin)
    signal.signal(signal.SIGUSR2, trace.end)
    threading.setprofile(trace.note)
    sys.setprofile(trace.note)
    app()
