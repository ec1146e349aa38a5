"""A promise is no more than its test."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
NAMED = re.findall(
    r"`([\w/]+\.py)::(\w+)`( \(slow\))?", (TESTS.parent / "docs" / "reliability.md").read_text()
)


@pytest.mark.parametrize(("file", "test", "slow"), sorted(set(NAMED)))
def test_the_tests_that_the_document_names_exist(file: str, test: str, slow: str) -> None:
    found = re.search(rf"^((?:@.*\n)*)(async )?def {test}\(", (TESTS / file).read_text(), re.MULTILINE)
    assert found
    assert bool(slow) == ("@pytest.mark.slow\n" in found[1])


def test_it_names_tests() -> None:
    assert len(NAMED) > 30
