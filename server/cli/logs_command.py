"""`tinsmith logs`: what the server and the engine have logged, as one."""

from __future__ import annotations

import heapq
import os
import re
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import typer

from ...engine.logs import FILES, FOLDER
from ..settings import LedgerSettings
from .command_line import fail, read_settings

LOGS_HELP = """Show the log of a server, running or not: what it and its engine wrote, in order of time.

Examples, in the folder where the server was started (or with the same `--data-dir`):

- `tinsmith logs` prints the last 100 lines

- `tinsmith logs -f` goes on printing what is logged, until Ctrl-C

- `tinsmith logs --of engine -n 1000` prints the engine's lines alone
"""

# A line begins with a time: of text, local; of JSON, UTC. Others belong to the line before them.
_BEGIN = re.compile(r'(?:\{"time": ")?(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d\.\d{3})')
_LOOK_SECONDS = 0.25
Line = tuple[str, str]  # its time, and its text with what belongs to it


def logs(
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="How many of the last lines.")] = 100,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C.")] = False,
    of: Annotated[Literal["server", "engine"] | None, typer.Option(help="Of one process alone.")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="The server's data directory [default: ./tinsmith-data].")
    ] = None,
) -> None:
    """Print the end of the log files."""
    settings = read_settings(LedgerSettings, {} if data_dir is None else {"data_dir": data_dir})
    folder = settings.data_dir / FOLDER
    files = [folder / f"{process}.log" for process in ((of,) if of else ("server", "engine"))]
    if not any(file.exists() for file in files):
        fail(f"there is no log in {folder}; give the server's data directory with --data-dir")
    ends = {file: file.stat().st_size if file.exists() else 0 for file in files}
    merged = list(heapq.merge(*(list(_all(file)) for file in files)))
    for _, text in merged[-lines:]:
        typer.echo(text)
    while follow:
        time.sleep(_LOOK_SECONDS)
        new = chain.from_iterable(_new(file, ends) for file in files)
        for _, text in sorted(new):
            typer.echo(text)


def _all(file: Path) -> Iterator[Line]:
    """A process's lines, from its older files on."""
    older = [file.with_name(f"{file.name}.{number}") for number in range(FILES - 1, 0, -1)]
    for each in (*older, file):
        if each.exists():
            yield from _lines(each.read_text("utf-8", "replace"))


def _new(file: Path, ends: dict[Path, int]) -> list[Line]:
    """What was written since the last look; a file that is shorter than before has been begun again."""
    if not file.exists():
        return []
    size = file.stat().st_size
    begin = ends[file] if size >= ends[file] else 0
    with file.open("rb") as opened:
        opened.seek(begin)
        data = opened.read()
    whole = data[: data.rfind(b"\n") + 1]
    ends[file] = begin + len(whole)
    return list(_lines(whole.decode("utf-8", "replace")))


def _lines(text: str) -> Iterator[Line]:
    begun: list[str] = []
    when = ""
    for line in text.splitlines():
        found = _BEGIN.match(line)
        if found and begun:
            yield when, os.linesep.join(begun)
            begun = []
        if found:
            when = found[1].replace("T", " ")
        begun.append(line)
    if begun:
        yield when, os.linesep.join(begun)
