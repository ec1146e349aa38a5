"""The plots of the documentation are those of the data beside them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from .pages import PAGES, ROOT

FIGURES = ROOT / "docs" / "figures"


def test_the_plots_are_drawn_from_the_data(tmp_path: Path) -> None:
    subprocess.run([sys.executable, FIGURES / "draw.py", tmp_path], check=True, timeout=300)
    drawn = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert drawn == {file.name: file.read_text() for file in FIGURES.glob("*.svg")}


def test_every_picture_is_shown_and_there() -> None:
    shown = {
        (page.parent / path).resolve()
        for page in PAGES
        for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text())
        if "://" not in path
    }
    devices = ROOT / "docs" / "devices"
    pictures = {*FIGURES.glob("*.svg"), *devices.glob("*.svg"), *(ROOT / "docs" / "images").iterdir()}
    assert shown == {picture.resolve() for picture in pictures}
