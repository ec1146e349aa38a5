"""Every notebook runs from its first cell to its last, against a server that it starts itself."""

import functools
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "notebooks"


def run(name: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Run a notebook; return what its cells printed, and the tables that they displayed; a plot must be among
    the outputs."""
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
    assert downloads(text) == downloads(printed(name)), "the stored outputs are older: make notebooks"
    return text, "".join(output.get("data", {}).get("text/markdown", "") for output in outputs)


def downloads(text: str) -> str:
    """The files that the last cell names."""
    (files,) = re.findall(r"^Downloaded: (.+)$", text, re.MULTILINE)
    return files


def printed(name: str) -> str:
    """What the cells of a notebook as it is stored have printed."""
    outputs = [output for cell in cells_of(name) for output in cell.get("outputs", [])]
    return "".join("".join(output.get("text", "")) for output in outputs)


def curve(text: str, name: str) -> list[float]:
    (values,) = re.findall(rf"{re.escape(name)}: ([-\d.e ]+)$", text, re.MULTILINE)
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


def test_tenants_and_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    text, _ = run("03_tenants_and_checkpoints.ipynb", 3, monkeypatch)
    before, after = curve(text, "alice"), curve(text, "alice, after the restart")
    assert after[0] < before[-1] < before[0], "the restart has lost nothing"
    assert "bob: 404" in text or "bob: 400" in text, "what is not published does not exist for others"
    assert "bob, of what is published:" in text
    assert re.search(r"bob deletes it: 40[34]", text)
    assert "adapter_model.safetensors" in text


def test_raw_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    text, _ = run("05_raw_rest.ipynb", 3, monkeypatch)
    first, *_, last = curve(text, "NLL per answer token")
    assert last < first
    assert "log-probs:" in text
    assert "adapter_model.safetensors" in text


def test_every_notebook_is_tested_and_has_its_outputs() -> None:
    names = {path.name for path in NOTEBOOKS.glob("*.ipynb")}
    assert names == {
        *("01_sft.ipynb", "02_rl.ipynb", "03_tenants_and_checkpoints.ipynb", "05_raw_rest.ipynb"),
    }
    for name in names:
        cells = cells_of(name)
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        assert all(cell["execution_count"] for cell in code), f"{name} is committed with its outputs"
        outputs = [output for cell in code for output in cell["outputs"]]
        assert not any(output["output_type"] == "error" for output in outputs)
        assert any("image/png" in output.get("data", {}) for output in outputs), f"{name} has a plot"
        assert "README.md" in downloads(printed(name)), f"{name}: the stored outputs are older"
        text = printed(name)
        assert not re.search(r"(?<![\w~])/(home|root|work)/", text), f"{name} shows a folder of the machine"


def cells_of(name: str) -> list[dict]:
    return json.loads((NOTEBOOKS / name).read_text())["cells"]


def first_cell(name: str) -> str:
    return "".join(next(cell["source"] for cell in cells_of(name) if cell["cell_type"] == "code"))


def test_the_first_cell_is_the_same_everywhere_and_names_the_project() -> None:
    (cell,) = {first_cell(path.name) for path in NOTEBOOKS.glob("*.ipynb")}
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {})
    assert f'REPOSITORY = "{urls.get("Repository", "")}"  # @param' in cell


def test_the_badge_opens_the_notebook_or_says_that_there_is_no_address_yet() -> None:
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {})
    for path in NOTEBOOKS.glob("*.ipynb"):
        text = "".join(cells_of(path.name)[0]["source"])
        (target,) = re.findall(r"colab-badge\.svg\)\]\((\S+)\)", text)
        repository = urls.get("Repository", "").removeprefix("https://github.com/")
        page = f"{repository}/blob/main/notebooks/{path.name}" if repository else ""
        assert target == f"https://colab.research.google.com/github/{page}"
        assert ("has no public address yet" in text) != bool(repository)


class Outside(NamedTuple):
    """A folder and a Python that have everything but a checkout and Tinsmith."""

    folder: Path
    python: Path

    def run(self, cell: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.python, "-c", cell],
            cwd=self.folder,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture
def outside(tmp_path: Path) -> Outside:
    venv.create(tmp_path / "venv", with_pip=False)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    # As paths, where editable installs are not looked for.
    folders = [Path(path) for path in sys.path if path.endswith("site-packages")]
    (site / "others.pth").write_text(
        "\n".join(map(str, (f for f in folders if not (f / "tinsmith").exists())))
    )
    (tmp_path / "work").mkdir()
    return Outside(tmp_path / "work", tmp_path / "venv" / "bin" / "python")


def test_without_a_repository_the_first_cell_says_what_to_set(outside: Outside) -> None:
    cell = re.sub('REPOSITORY = "[^"]*"', 'REPOSITORY = ""', first_cell("01_sft.ipynb"))
    done = outside.run(cell)
    assert done.returncode != 0
    assert "set REPOSITORY above to the web address" in done.stderr.splitlines()[-1]


def test_the_first_cell_installs_the_wheel_from_the_archive(outside: Outside, tmp_path: Path) -> None:
    """The archive is behind a real server; the dependencies are there already and are not installed."""
    archive = tmp_path / "site" / "project" / "archive" / "HEAD.zip"
    archive.parent.mkdir(parents=True)
    with zipfile.ZipFile(archive, "w") as packed:
        for line in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines():
            if (ROOT / line).is_file():
                packed.write(ROOT / line, f"project-HEAD/{line}")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "site"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/project"
        cell = re.sub('REPOSITORY = "[^"]*"', f'REPOSITORY = "{address}"', first_cell("01_sft.ipynb"))
        done = outside.run(
            cell + "\nimport tinsmith, local_server\nprint(tinsmith.__file__)",
            PIP_NO_BUILD_ISOLATION="0",  # setuptools is there
            PIP_NO_DEPS="1",
        )
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert str(outside.python.parents[1]) in done.stdout.splitlines()[-1], "a wheel of its own"
    assert (outside.folder / "tinsmith-checkout" / "demo" / "sft.py").is_file()
