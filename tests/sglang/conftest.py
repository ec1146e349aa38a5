"""A real SGLang for all tests of this folder, and Tinsmith servers that sample on it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tinker")

import tinker
from conformance.conftest import ALICE, BOB
from conformance.server_process import ServerProcess, Wire
from tinsmith.engine import messages
from tinsmith.server.base_models import resolve
from tinsmith.server.ledger import tenancy
from tinsmith.server.plugins.sglang import endpoints as registered
from tiny_models import write_model

from .place import MakePlace, Place
from .proxy import Proxy
from .sglang_process import LORA, SglangProcess

TENANTS = (("alice", ALICE), ("bob", BOB))
CACHE = Path(__file__).parents[2] / ".cache"


@pytest.fixture(scope="session")
def sglang_python() -> Path:
    venv = Path(os.environ.get("TINSMITH_SGLANG_VENV") or CACHE / "sglang" / "venv")
    if not (venv / ".installed").exists():
        pytest.skip("no SGLang: `make sglang` makes its environment, where there is a python3.11 with torch")
    return venv / "bin" / "python"


@pytest.fixture(scope="session")
def sglang(sglang_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SglangProcess]:
    """A real SGLang with the tiny llama in float32 and room for six adapters of rank 16. A test that ends it
    starts it again."""
    folder = tmp_path_factory.mktemp("sglang")
    running = SglangProcess(sglang_python, write_model(folder / "tiny", "llama"), folder / "log", *LORA)
    running.start()
    yield running
    running.stop()


@pytest.fixture(scope="session")
def make_tinsmith(
    sglang: SglangProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., ServerProcess]]:
    """Start servers with a data directory each, which sample on SGLang; they are killed afterwards."""
    servers: list[ServerProcess] = []

    def make(
        *options: str, tenants: tuple[tuple[str, str], ...] = TENANTS, **environment: str
    ) -> ServerProcess:
        data_dir = tmp_path_factory.mktemp("tinsmith") / "data"
        keys = [f"--api-key={owner}={key}" for owner, key in tenants]
        where = ("--max-rank", "16", "--sglang", sglang.url, "--sglang-allow", "localhost")
        cache_dir = CACHE / "tests" / "servers"
        servers.append(
            ServerProcess(sglang.model, data_dir, cache_dir, *keys, *where, *options, **environment)
        )
        return servers[-1]

    yield make
    for server in servers:
        server.kill()


@pytest.fixture(scope="session")
def tinsmith(make_tinsmith: Callable[..., ServerProcess]) -> Iterator[ServerProcess]:
    running = make_tinsmith().start()
    yield running
    code = running.stop()
    assert code == 0, running.log


@pytest.fixture
def alice(tinsmith: ServerProcess) -> Iterator[Wire]:
    wire = Wire(tinsmith.url, ALICE)
    yield wire
    wire.http.close()


@pytest.fixture
def service(tinsmith: ServerProcess) -> Iterator[tinker.ServiceClient]:
    client = tinker.ServiceClient(base_url=tinsmith.url, api_key=ALICE)
    yield client
    client.close("success").result()


@pytest.fixture
async def make_place(
    tmp_path: Path, sglang: Any, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[MakePlace]:
    monkeypatch.setattr(registered, "CHECK_SECONDS", 0.1)
    places: list[Place] = []
    model = resolve(f"tiny={sglang.model}", tmp_path, None)

    async def make(
        engine: messages.SamplingEngine = "auto", data_dir: Path | None = None, **settings: Any
    ) -> Place:
        places.append(Place(data_dir or tmp_path / f"data{len(places)}", model, engine, **settings))
        owner = partial(tenancy.ensure_tenant, tenant="me")
        await places[-1].server.ledger.write(owner)
        return places[-1]

    yield make
    for place in places:
        await place.close()


@pytest.fixture
async def proxy(sglang: Any) -> AsyncIterator[Proxy]:
    made = Proxy(sglang.port)
    await made.open()
    yield made
    made.kill()
