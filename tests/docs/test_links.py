"""Every link of the documentation leads somewhere: to a file of the repository, and to a heading in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .pages import PAGES, ROOT

CODE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def headings(page: Path) -> set[str]:
    """The anchors of a page, which GitHub and the site make of its headings."""
    found = re.findall(r"^#{1,6} (.+)$", CODE.sub("", page.read_text()), re.MULTILINE)
    plain = (re.sub(r"[`*]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", each)) for each in found)
    return {re.sub(r"[^\w\- ]", "", each.lower()).strip().replace(" ", "-") for each in plain}


def links(page: Path) -> list[str]:
    """The targets of a page's links and pictures within the repository."""
    text = re.sub(r"`[^`\n]*`", "", CODE.sub("", page.read_text()))
    found = re.findall(r"\]\(([^()\s]+)\)", text)
    return [each for each in found if not re.match(r"[a-z]+:", each)]


def broken(page: Path) -> list[str]:
    """The links of a page that lead nowhere."""
    return [link for link in links(page) if not _leads_somewhere(page, link)]


def _leads_somewhere(page: Path, link: str) -> bool:
    name, _, anchor = link.partition("#")
    target = (page.parent / name).resolve() if name else page
    if not target.exists():
        return False
    return not anchor or target.suffix != ".md" or anchor in headings(target)


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    assert not broken(page)


def test_a_broken_link_would_be_noticed(tmp_path: Path) -> None:
    page = ROOT / "docs" / "quickstart.md"
    assert "settings.md" in links(page)
    assert "your-own-loop" in headings(ROOT / "README.md")
    wrong = tmp_path / "page.md"
    wrong.write_text("# A page\n\n[here](#a-page) [there](#no-such-heading) [elsewhere](missing.md)\n")
    assert broken(wrong) == ["#no-such-heading", "missing.md"]


def test_every_page_is_reached_from_the_readme() -> None:
    seen: set[Path] = set()
    new = {ROOT / "README.md"}
    while new:
        seen |= new
        targets = {(page.parent / link.partition("#")[0]).resolve() for page in new for link in links(page)}
        new = {target for target in targets if target.suffix == ".md"} - {page.resolve() for page in seen}
    assert {page.resolve() for page in PAGES} <= {page.resolve() for page in seen}
