"""Every notebook runs from its first cell to its last, against a server that it starts itself."""

import re
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def run(name: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """What its cells printed, and the tables that they displayed; a plot must be among the outputs."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("TINSMITH_NOTEBOOK_STEPS", str(steps))
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOKS)}}
    )
    client.execute()  # raises CellExecutionError with the cell and its traceback

    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs), "the curves are plotted"
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    return text, "".join(output.get("data", {}).get("text/markdown", "") for output in outputs)


def curve(text: str, name: str) -> list[float]:
    (values,) = re.findall(re.escape(name) + ": (.+)", text)
    return [float(value) for value in values.split()]


def test_sft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINSMITH_NOTEBOOK_BATCH", "4")  # all three fit one program
    text, tables = run("01_sft.ipynb", 3, monkeypatch)
    first, *_, last = curve(text, "NLL per answer token")
    assert last < 0.9 * first, "three steps are enough to see the loss fall"
    assert "| before |" in tables


def test_rl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINSMITH_NOTEBOOK_GROUP", "4")
    text, tables = run("02_rl.ipynb", 2, monkeypatch)
    first, *_, last = curve(text, "mean reward")
    assert last > first, "two steps are enough to see the reward rise"
    assert max(curve(text, "KL(sampler || trainer)")) < 1e-4, "they run the same weights"
    start, *_, end = curve(text, "KL(sampler || base)")
    assert abs(start) < 1e-4 < end, "a fresh adapter is the base model; a trained one is not"
    assert "| before |" in tables


def test_every_notebook_is_tested() -> None:
    assert {path.name for path in NOTEBOOKS.glob("*.ipynb")} == {"01_sft.ipynb", "02_rl.ipynb"}
