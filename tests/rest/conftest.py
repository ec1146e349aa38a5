"""One server for the tests of the REST APIs: adapters and full weights, a key of alice and one of bob."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("tinker")

from conformance.server_process import ServerProcess
from rest.clients import ALICE, BOB, Tinkercloud, Xorl
from tiny_models import write_model


@pytest.fixture(scope="session")
def rest_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    model = tmp_path_factory.mktemp("models") / "tiny"
    write_model(model, "llama")
    running = ServerProcess(
        model,
        tmp_path_factory.mktemp("rest") / "data",
        Path(__file__).parents[2] / ".cache" / "tests" / "servers",
        *("--api-key", f"alice={ALICE}", "--api-key", f"bob={BOB}", "--full-weight"),
        TINSMITH_LONG_POLL_SECONDS="5",
    )
    running.start()
    yield running
    code = running.stop()
    assert code == 0, running.log


@pytest.fixture
def tinkercloud(rest_server: ServerProcess) -> Iterator[Tinkercloud]:
    with Tinkercloud(rest_server.url, ALICE) as client:
        yield client


@pytest.fixture
def xorl(rest_server: ServerProcess) -> Iterator[Xorl]:
    with Xorl(rest_server.url, ALICE) as client:
        yield client
