"""tinker-cookbook in an environment of its own, a chat model, and a server for it: `make cookbook`."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("tinker")

from conformance.server_process import ServerProcess
from cookbook import workplace
from cookbook.programs import Cookbook

CACHE = Path(__file__).parents[2] / ".cache" / "cookbook"
SEEN = pytest.StashKey[list[tuple[str, str]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SEEN] = []


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """The rows of docs/cookbook.md."""
    for program, seen in config.stash[SEEN]:
        terminalreporter.write_line(f"| {program} | {seen} |")


@pytest.fixture
def seen(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """A collection of what each program did, for the table in the docs."""
    return lambda program, what: request.config.stash[SEEN].append((program, what))


@pytest.fixture(scope="session")
def python() -> Path:
    interpreter = CACHE / "venv" / "bin" / "python"
    if not interpreter.exists():
        pytest.skip("make cookbook makes the cookbook's environment")
    return interpreter


@pytest.fixture(scope="session")
def chat_model(python: Path) -> Path:
    """Trained once, and kept."""
    folder = CACHE / "chat-model"
    if not (folder / "model.safetensors").exists():
        program = Path(__file__).with_name("chat_model.py")
        subprocess.run([python, program, folder], check=True, timeout=3600)
    return folder


@pytest.fixture(scope="session")
def server(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    names = [option for name in workplace.OTHERS for option in ("--model", f"{name}={chat_model}")]
    running = ServerProcess(
        chat_model,
        tmp_path_factory.mktemp("server") / "data",
        CACHE / "compiled",
        *("--model", f"{workplace.CHAT}={chat_model}", *names),
        XLA_FLAGS="",  # compiled as for anybody, not as for tests, which are over sooner
    )
    running.start()
    yield running
    assert running.stop() == 0, running.log


@pytest.fixture(scope="session")
def cookbook(
    python: Path, chat_model: Path, server: ServerProcess, tmp_path_factory: pytest.TempPathFactory
) -> Cookbook:
    folder = tmp_path_factory.mktemp("cookbook")
    where = "import tinker_cookbook as c; print(c.__path__[0])"
    found = subprocess.run([python, "-c", where], check=True, capture_output=True, text=True)
    texts = Path(found.stdout.strip()) / "example_data" / "multilingual.txt"
    workplace.build(folder, chat_model, texts.read_text().splitlines())
    return Cookbook(python, folder, server.url)
