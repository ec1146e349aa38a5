"""Every notebook runs from its first cell to its last, against a server that it starts itself."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("TINSMITH_NOTEBOOK_STEPS", "3")
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=400, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    )
    client.execute()  # raises CellExecutionError with the cell and its traceback

    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    (losses,) = re.findall(r"NLL per answer token: (.+)", text)
    first, *_, last = [float(loss) for loss in losses.split()]
    assert last < 0.9 * first, "three steps are enough to see the loss fall"
    assert any("image/png" in output.get("data", {}) for output in outputs), "the loss is plotted"
    assert any("| before |" in output.get("data", {}).get("text/markdown", "") for output in outputs)
