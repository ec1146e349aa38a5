"""The code of the documentation's pages, block by block."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tinsmith

ROOT = Path(tinsmith.__file__).resolve().parent
DEMO = "demo/data/README.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / DEMO]


class Code(str):
    """The text of a block, or what a test has made of it with the methods below; `blocks` are its sources."""

    blocks: frozenset[Block] = frozenset()

    @classmethod
    def of(cls, made: Any, *sources: Any) -> Any:
        """Remember the sources' blocks in a text, or in each of several ones."""
        if not isinstance(made, str):
            return type(made)(cls.of(each, *sources) for each in made)
        code = cls(made)
        code.blocks = frozenset().union(*(getattr(source, "blocks", ()) for source in sources))
        return code

    def __add__(self, other: str) -> Code:
        return Code.of(str.__add__(self, other), self, other)

    def __radd__(self, other: str) -> Code:
        return Code.of(str.__add__(other, self), self, other)

    def __getitem__(self, part: Any) -> Code:
        return Code.of(str.__getitem__(self, part), self)


def _remembering(name: str) -> Callable[..., Any]:
    method = getattr(str, name)
    return lambda code, *arguments: Code.of(method(code, *arguments), code)


for _name in ("replace", "strip", "split", "splitlines", "partition", "rpartition", "removeprefix"):
    setattr(Code, _name, _remembering(_name))


READ: set[Block] = set()
"""The blocks that `block` has returned, and those that `executed` was told of, since they were cleared."""
EXECUTED: set[Block] = set()


def executed(*texts: str) -> None:
    """Note that these texts were run, or passed on to something that runs them."""
    for text in texts:
        EXECUTED.update(getattr(text, "blocks", ()))


@dataclass(frozen=True)
class Block:
    """A block of code between two fences."""

    page: str
    language: str
    text: str

    @property
    def name(self) -> tuple[str, str]:
        """The page, and the first line."""
        return self.page, self.text.partition("\n")[0]


def blocks() -> list[Block]:
    """Return all blocks, in the order of the pages."""
    fence = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    return [
        Block(DEMO if page == ROOT / DEMO else page.name, language, text)
        for page in PAGES
        for language, text in fence.findall(page.read_text())
    ]


def block(page: str, begins: str) -> Code:
    """The code of the shortest of a page's blocks that begins so."""
    found = [each for each in blocks() if each.page == page and each.text.startswith(begins)]
    assert found, f"{page} has no block that begins with {begins!r}"
    shortest = min(found, key=lambda each: len(each.text))
    READ.add(shortest)
    code = Code(shortest.text)
    code.blocks = frozenset({shortest})
    return code


def of_page(page: str) -> list[Block]:
    """Return a page's blocks, in their order."""
    found = [each for each in blocks() if each.page == page]
    READ.update(found)
    return found


def inline_commands(begins: str) -> list[str]:
    """Code within text that begins so and goes on, such as `make slow`."""
    found: list[str] = []
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        found += re.findall(rf"`({begins} [^`]+)`", re.sub(r"\s*\n\s*", " ", text))
    return sorted(set(found))
