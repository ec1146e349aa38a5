"""Records which public methods of the SDK's clients each test calls, for the table in docs/compatibility.md.

`make methods` runs the tests and writes the table. In every run, a test that has not called what the table
says of it fails. A call counts when it has returned, and not when the SDK itself has made it.
"""

from __future__ import annotations

import functools
import inspect
import re
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import tinker

DOCUMENT = Path(__file__).parents[2] / "docs" / "compatibility.md"
CLIENTS = [
    *(tinker.ServiceClient, tinker.TrainingClient, tinker.SamplingClient, tinker.RestClient),
    tinker.AdminClient,
]
HEAD = "| Method | Test |\n|---|---|\n"

called: set[str] = set()
"""`Client.method`, since the test that runs began."""
_inside: ContextVar[bool] = ContextVar("a method of the SDK runs", default=False)


def public(client: type) -> list[str]:
    return sorted(name for name, _ in inspect.getmembers(client, callable) if not name.startswith("_"))


def every() -> list[str]:
    return [f"{client.__name__}.{name}" for client in CLIENTS for name in public(client)]


@functools.cache
def record() -> None:
    """Put calls into `called` from now on."""
    for client in CLIENTS:
        for name in public(client):
            found = inspect.getattr_static(client, name)
            kind = type(found) if isinstance(found, classmethod | staticmethod) else None
            function = _recorded(f"{client.__name__}.{name}", found.__func__ if kind else found)
            setattr(client, name, kind(function) if kind else function)


def _recorded(method: str, function: Any) -> Any:
    async def awaited(coroutine: Any) -> Any:
        token = _inside.set(True)
        try:
            result = await coroutine
        finally:
            _inside.reset(token)
        called.add(method)
        return result

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        if _inside.get():
            return function(*arguments, **options)
        token = _inside.set(True)
        try:
            result = function(*arguments, **options)
        finally:
            _inside.reset(token)
        if inspect.iscoroutine(result):
            return awaited(result)
        called.add(method)
        return result

    return call


def documented() -> dict[str, str]:
    """The table: which test calls a method, as `conformance/file.py::test`."""
    return dict(re.findall(r"^\| `(\w+Client\.\w+)` \| `([^`]+)` \|$", DOCUMENT.read_text(), re.MULTILINE))


def check(test: str) -> None:
    """Raises AssertionError unless the test, which has run, called what the table says of it."""
    missing = {method for method, by in documented().items() if by == test} - called
    assert not missing, f"docs/compatibility.md says that {test} calls {sorted(missing)}: make methods"


def write(calls: dict[str, set[str]]) -> None:
    """The table of a run: `calls` of each test that passed, in order. A method keeps its test, if it may."""
    before, rows = documented(), []
    for method in every():
        tests = [test for test, methods in calls.items() if method in methods]
        if tests:
            rows.append(f"| `{method}` | `{before[method] if before.get(method) in tests else tests[0]}` |")
    text = DOCUMENT.read_text()
    start = text.index("\n", text.index("## Methods")) + 2
    end = re.compile(r"(?:.+\n)+\n\| Method.*\n(?:\|.*\n)+").match(text, start)
    assert end is not None, "docs/compatibility.md has no table of methods"
    count = f"{len(rows)} of {len(every())} methods are served.\n\n"
    DOCUMENT.write_text(text[:start] + count + HEAD + "\n".join(rows) + "\n" + text[end.end() :])
