"""Every message that docs/troubleshooting.md explains is one that the code has."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import tinsmith

ROOT = Path(tinsmith.__file__).resolve().parent
PAGE = ROOT / "docs" / "troubleshooting.md"
_OF_OTHERS = {"RESOURCE_EXHAUSTED", "out of memory"}  # XLA's


def messages() -> list[str]:
    """The texts of the code; what is filled into one is `…`."""
    found = []
    for room in ("server", "engine", "model", "losses", "ckpt"):
        for file in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    found.append(
                        "".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values)
                    )
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def explained() -> list[str]:
    """The messages in the first column of the page's tables."""
    rows = re.findall(r"^\| (.*?) \| ", PAGE.read_text(), re.MULTILINE)
    return [text for row in rows for text in re.findall(r"`([^`]+)`", row)]


@pytest.fixture(scope="module")
def known() -> str:
    return "\n".join(messages())


@pytest.mark.parametrize("text", [each for each in explained() if each not in _OF_OTHERS])
def test_the_message_is_one_of_ours(text: str, known: str) -> None:
    parts = [re.escape(part.strip()) for part in re.split(r"…|\d+", text) if len(part.strip()) > 2]
    assert re.search(".*".join(parts), known), text


def test_many_are_explained() -> None:
    assert len(explained()) > 25
