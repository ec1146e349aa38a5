"""One server process for all tests that leave it alive and well."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("tinker")

import tinker
from conformance import sdk_methods
from conformance.server_process import ServerProcess, Wire
from tiny_models import write_model

# Clients of servers that a test has killed still send heartbeats; their warnings do not concern later tests.
logging.getLogger("tinker.lib.internal_client_holder").setLevel(logging.ERROR)

ALICE, BOB = "tml-alice", "tml-bob"
CALLS: dict[str, set[str]] = {}  # of the SDK's methods, by the tests that passed


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    sdk_methods.record()
    sdk_methods.called.clear()
    yield
    test = f"conformance/{item.path.name}::{item.name.partition('[')[0]}"
    CALLS.setdefault(test, set()).update(sdk_methods.called)
    if os.environ.get("TINSMITH_WRITE_METHODS") != "1":
        sdk_methods.check(test)


def pytest_sessionfinish() -> None:
    if os.environ.get("TINSMITH_WRITE_METHODS") == "1":
        sdk_methods.write(CALLS)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_model(folder, "llama")
    return folder


@pytest.fixture(scope="session")
def cache_dir() -> Path:
    """The cache that is kept from run to run: the same tiny programs are compiled once."""
    return Path(__file__).parents[2] / ".cache" / "tests" / "servers"


@pytest.fixture(scope="module")
def make_server(
    tiny_model: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., ServerProcess]]:
    """Start servers for one module, each with its own data directory; they are killed afterwards."""
    servers: list[ServerProcess] = []

    def make(*options: str, launcher: Path | None = None, **environment: str) -> ServerProcess:
        data_dir = tmp_path_factory.mktemp("server") / "data"
        servers.append(
            ServerProcess(tiny_model, data_dir, cache_dir, *options, launcher=launcher, **environment)
        )
        return servers[-1]

    yield make
    for server in servers:
        server.kill()


@pytest.fixture(scope="session")
def server(
    tiny_model: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """A server with keys of alice, an administrator, and bob; it waits two seconds for gaps."""
    running = ServerProcess(
        tiny_model,
        tmp_path_factory.mktemp("server") / "data",
        cache_dir,
        *("--api-key", f"alice={ALICE}", "--api-key", f"bob={BOB}", "--admin", "alice", "--max-rank", "16"),
        TINSMITH_GAP_GRACE_SECONDS="2",
        TINSMITH_LONG_POLL_SECONDS="5",
        TINSMITH_MAX_BODY_BYTES=str(8 << 20),
        TINSMITH_MAX_IMPORT_BYTES=str(16 << 20),
    )
    running.start()
    yield running
    code = running.stop()
    assert code == 0, running.log


@pytest.fixture
def wire(server: ServerProcess) -> Iterator[Wire]:
    alice = Wire(server.url, ALICE)
    yield alice
    alice.http.close()


@pytest.fixture
def service(server: ServerProcess) -> Iterator[tinker.ServiceClient]:
    client = tinker.ServiceClient(base_url=server.url, api_key=ALICE)
    yield client
    client.close("success").result()


@pytest.fixture
def training(service: tinker.ServiceClient) -> tinker.TrainingClient:
    return service.create_lora_training_client(base_model="tiny", rank=4, seed=7).result()
