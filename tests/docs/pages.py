"""The code of the documentation's pages, block by block."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import tinsmith

ROOT = Path(tinsmith.__file__).resolve().parent
DEMO = "demo/data/README.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / DEMO]


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


def block(page: str, begins: str) -> str:
    """The code of the shortest of a page's blocks that begins so."""
    found = [each.text for each in blocks() if each.page == page and each.text.startswith(begins)]
    assert found, f"{page} has no block that begins with {begins!r}"
    return min(found, key=len)


def inline_commands(begins: str) -> list[str]:
    """Code within text that begins so and goes on, such as `make slow`."""
    found: list[str] = []
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        found += re.findall(rf"`({begins} [^`]+)`", re.sub(r"\s*\n\s*", " ", text))
    return sorted(set(found))
