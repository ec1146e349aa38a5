"""Runs the notebooks, or the named ones, with their real model and stores the outputs (`make notebooks`)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
CELL_SECONDS = 1800


def run(file: Path) -> None:
    """Run one notebook; a cell that fails raises CellExecutionError. No folder of this machine is stored."""
    notebook = nbformat.read(file, as_version=4)
    resources = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        record_timing=False,
        coalesce_streams=True,  # of a progress bar the end alone is stored
        resources=resources,
    ).execute()
    text = nbformat.writes(notebook).replace(f"{Path.home()}/", "~/")
    file.write_text(text + "\n")


if __name__ == "__main__":
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"
    for name in sys.argv[1:] or sorted(FOLDER.glob("*.ipynb")):
        run(Path(name))
