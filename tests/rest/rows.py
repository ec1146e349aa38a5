"""Every row of the two pages that this server's REST API was made from (tinkercloud's and xorl's), as a page
has it and as the clients of that server ask it.

A `Row` is one request with what its answer is like: `like` compares the shape of an answer with an example,
which is the page's own where the page has one. `$name` stands for something that the test has made before.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Shape = Literal["page", "client"]


@dataclass(frozen=True)
class Row:
    """`answer` is an example of the answer, `result` of what a poll then says; None: nothing is polled."""

    method: str
    path: str
    shape: Shape
    body: dict[str, Any] | None = None
    answer: Any = field(default_factory=dict)
    result: dict[str, Any] | None = None
    status: int = 200

    @property
    def name(self) -> str:
        return f"{self.method} {self.path} ({self.shape})"


def filled(value: Any, things: dict[str, Any]) -> Any:
    """Return the example with ids of real things in place of its `$name`s."""
    if isinstance(value, str):
        if value.startswith("$") and value[1:] in things:
            return things[value[1:]]
        for name, thing in things.items():
            if isinstance(thing, str):
                value = value.replace(f"${name}$", thing)
        return value
    if isinstance(value, dict):
        return {key: filled(each, things) for key, each in value.items()}
    if isinstance(value, list):
        return [filled(each, things) for each in value]
    return value


def like(example: Any, answer: Any, where: str = "answer") -> None:
    """Everything that the example has is in the answer, and of the same kind; null is of any."""
    if example is None:
        return
    if isinstance(example, dict):
        assert isinstance(answer, dict), f"{where}: {answer!r} is no object"
        for key, each in example.items():
            assert key in answer, f"{where} has no {key!r}: {answer}"
            like(each, answer[key], f"{where}.{key}")
    elif isinstance(example, list):
        assert isinstance(answer, list), f"{where}: {answer!r} is no list"
        assert not example or answer, f"{where} is empty"
        for each in answer[: len(example)]:
            like(example[0], each, f"{where}[]")
    elif isinstance(example, bool) or isinstance(answer, bool):
        assert type(answer) is type(example), f"{where}: {answer!r}"
    elif isinstance(example, int | float):
        assert isinstance(answer, int | float), f"{where}: {answer!r} is no number"
    else:
        assert isinstance(answer, type(example)), f"{where}: {answer!r} is no {type(example).__name__}"
