"""The removal of sampler weights."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
from engineless import Server
from sqlalchemy import Connection
from tinsmith.server.errors import NotFound
from tinsmith.server.ledger import tenancy
from tinsmith.server.models import samplers as samplers_module
from tinsmith.server.models.samplers import Samplers, new_directory, run_of

HOUR = 3600.0


def session(connection: Connection, name: str, silent_for: float, finished: bool = False) -> None:
    tenancy.add_session(connection, id=name, owner="me", tags=[], user_metadata={})
    tenancy.heartbeat(connection, name, time.time() - silent_for)
    if finished:
        tenancy.finish_session(connection, name, "success", None)


@pytest.fixture
async def samplers(tmp_path: Path) -> AsyncIterator[Samplers]:
    """Behind an engine that is not started."""
    server = Server(tmp_path, unnamed_sampler_seconds=24 * HOUR)
    await server.ledger.write(lambda connection: tenancy.ensure_tenant(connection, "me"))
    yield server.samplers
    server.ledger.close()


@pytest.fixture
async def make(samplers: Samplers, tmp_path: Path):
    """Makes a session with unnamed weights, a named sampler and a base sampler; gives the weights' folder."""

    async def make(name: str, **fields) -> Path:
        directory = new_directory(f"{name}:train:0")
        named = f"checkpoints/{name}/x-1"
        for key in (directory, named):
            (tmp_path / key).mkdir(parents=True)

        def change(connection: Connection) -> None:
            session(connection, name, **fields)
            samplers_module.add(connection, 1 << 20, "me", name, f"{name}:sample:0", "tiny", None, directory)
            path = f"tinker://{name}:train:0/sampler_weights/x"
            samplers_module.add(connection, 1 << 20, "me", name, f"{name}:sample:1", "tiny", path, named)
            samplers_module.add(connection, 1 << 20, "me", name, f"{name}:sample:2", "tiny", None, None)

        await samplers.ledger.write(change)
        return tmp_path / directory

    return make


async def is_known(samplers: Samplers, identifier: str) -> bool:
    try:
        await samplers.find("me", identifier)
    except NotFound:
        return False
    return True


async def test_unnamed_weights_go_when_their_session_is_over_or_silent_for_long(
    samplers: Samplers, make, tmp_path: Path
) -> None:
    folders = {
        "live": await make("live", silent_for=23 * HOUR),
        "silent": await make("silent", silent_for=25 * HOUR),
        "over": await make("over", silent_for=0.0, finished=True),
    }
    assert await is_known(samplers, "silent:sample:0")
    await samplers.sweep()
    assert {name: folder.exists() for name, folder in folders.items()} == {
        "live": True,
        "silent": False,
        "over": False,
    }
    for name in folders:
        assert [await is_known(samplers, f"{name}:sample:{number}") for number in range(3)] == [
            name == "live",
            True,
            True,
        ]
        assert (tmp_path / "checkpoints" / name / "x-1").exists(), "a checkpoint's weights are its own"


async def test_a_sample_is_a_sign_of_life(samplers: Samplers, make) -> None:
    folder = await make("raw", silent_for=25 * HOUR)
    await samplers.sampled(await samplers.find("me", "raw:sample:0"))
    await samplers.sweep()
    assert folder.exists()


async def test_old_directories_without_a_sampler_are_removed(
    samplers: Samplers, make, tmp_path: Path
) -> None:
    """Inflight saves leave such directories behind; a sampler may yet move to a young one."""
    kept = await make("live", silent_for=0.0)
    old, young = (tmp_path / new_directory("live:train:0") for _ in range(2))
    for directory in (old, young):
        directory.mkdir()
    for directory in (old, kept):
        os.utime(directory, times=(time.time() - 2 * HOUR,) * 2)
    await samplers.sweep()
    assert [directory.exists() for directory in (old, young, kept)] == [False, True, True]


def test_the_directory_of_unnamed_weights_tells_their_model() -> None:
    assert run_of(new_directory("0a1b:train:3")) == "0a1b:train:3"
    assert run_of("checkpoints/0a1b@train@3/sampler_weights/x-1") is None
    assert run_of(None) is None


async def test_publishing_moves_the_followers_of_one_model(samplers: Samplers) -> None:
    def change(connection: Connection) -> None:
        session(connection, "s", 0.0)
        add = partial(samplers_module.add, connection, 1 << 20, "me", "s")
        add("first", "tiny", None, "samplers/a/1", follows="a")
        add("second", "tiny", None, "samplers/a/2", follows="a")
        add("other", "tiny", None, "samplers/b/1", follows="b")
        add("still", "tiny", None, "samplers/a/3")
        tenancy.publish_inflight(connection, "second")
        tenancy.publish_inflight(connection, "still")

    await samplers.ledger.write(change)
    found = {
        name: (await samplers.find("me", name)).directory for name in ("first", "second", "other", "still")
    }
    assert found == {
        "first": "samplers/a/2",
        "second": "samplers/a/2",
        "other": "samplers/b/1",
        "still": "samplers/a/3",
    }
