"""Log lines, the same for the server and the engine: as text, or as JSON with the ids they are about.

Each process writes to standard error, and to its own file, which is kept small. `tinsmith logs` merges both
files.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

Format = Literal["text", "json"]
FOLDER = "logs"
_NOISY = ("uvicorn", "alembic", "asyncio", "httpx", "jax")
FILE_BYTES, FILES = 8 << 20, 4  # log files of each process: the current one and three older ones

_ids: ContextVar[dict[str, str] | None] = ContextVar("ids", default=None)


@contextmanager
def ids(**names: str | None) -> Iterator[None]:
    """Add ids to the lines logged in this context: `request_id`, `operation_id`, `model_id`, `tenant`."""
    before = _ids.set({name: each for name, each in names.items() if each})
    try:
        yield
    finally:
        _ids.reset(before)


def add_ids(**names: str) -> None:
    """Add ids to the current context, and so for all tasks that share it."""
    known = _ids.get()
    if known is not None:
        known.update(names)


def configure(level: str, form: Format, file: Path | None = None) -> None:
    """Send every line to standard error and to `file`, whose folder is created for this user alone."""
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if file is not None:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600))
        handlers.append(_File(file, "a", FILE_BYTES, FILES - 1, "utf-8"))
    for handler in handlers:
        handler.setFormatter(JsonLines() if form == "json" else TextLines())
        root.addHandler(handler)
    root.setLevel(level.upper())
    for noisy in _NOISY:
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("absl").setLevel(logging.ERROR)


class _File(logging.handlers.RotatingFileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """Drop a line on a full disk; it is on standard error all the same."""


def _name(record: logging.LogRecord) -> str:
    return record.name.removeprefix("tinsmith.")


class TextLines(logging.Formatter):
    """Lines such as `2026-11-30 18:07:18.760 INFO engine: starting JAX`, with local times."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created).isoformat(" ", "milliseconds")
        text = f"{when} {record.levelname:<7} {_name(record)}: {record.getMessage()}"
        return text + _trace(self, record)


class JsonLines(logging.Formatter):
    """One JSON object per line: `time` (UTC), `level`, `logger`, `message`, the ids, and `exception`."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": when, "level": record.levelname.lower(), "logger": _name(record)}
        line |= {"message": record.getMessage(), **(_ids.get() or {})}
        if trace := _trace(self, record).strip():
            line["exception"] = trace
        return json.dumps(line, ensure_ascii=False)


def _trace(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    found = []
    if record.exc_info:
        found.append(formatter.formatException(record.exc_info))
    if record.stack_info:
        found.append(formatter.formatStack(record.stack_info))
    return "".join(f"\n{each}" for each in found)
