"""A server whose disk fills up, and has room again."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tinker
from conformance.batches import batch, logprobs
from conformance.server_process import ServerProcess, Wire
from small_disk import fill, small_disk

RESERVE = 256 << 10


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with small_disk(tmp_path_factory.mktemp("full") / "disk", "16m") as folder:
        yield folder


@pytest.fixture(scope="module")
def server(disk: Path, tiny_model: Path, cache_dir: Path, tmp_path_factory) -> Iterator[ServerProcess]:
    data_dir = tmp_path_factory.mktemp("server") / "data"
    data_dir.symlink_to(disk)  # its log stays outside
    running = ServerProcess(
        tiny_model,
        data_dir,
        cache_dir,
        TINSMITH_DISK_RESERVE_BYTES=str(RESERVE),
        TINSMITH_LONG_POLL_SECONDS="2",
    )
    running.start()
    yield running
    running.kill()


@pytest.fixture
def wire(server: ServerProcess) -> Wire:
    return Wire(server.url, "tml-local")


def test_without_room_submits_are_507_and_nothing_is_lost(
    server: ServerProcess, disk: Path, wire: Wire
) -> None:
    model = wire.model()
    before = wire.forward_backward(model, 1)
    assert server.health()["disk"]["full"] is False
    ballast = fill(disk, leave=RESERVE // 2)
    time.sleep(1.5)  # the server looks at the disk once a second
    refused = wire.forward_backward(model, 2)
    assert refused.status_code == 507
    assert "0 MiB left" in refused.json()["detail"]
    assert int(refused.headers["Retry-After"]) <= 60, "longer is not obeyed"
    health = server.health()["disk"]
    assert health["full"] is True
    assert health["free_bytes"] < RESERVE == health["reserve_bytes"]
    assert wire.forward_backward(model, 1).json() == before.json(), "it was accepted, and still is"
    assert "metrics" in wire.result(before)
    ballast.unlink()
    time.sleep(0.3)
    assert "metrics" in wire.result(wire.forward_backward(model, 2))


def test_a_save_without_room_fails_alone(disk: Path, wire: Wire) -> None:
    model = wire.model(rank=128)
    wire.forward_backward(model, 1)
    wire.result(wire.optim_step(model, 2))  # zeros would take little room
    ballast = fill(disk, leave=RESERVE + 100_000)
    time.sleep(0.3)
    failed = wire.result(wire.post("save_weights", model_id=model, seq_id=3, path="large"))
    assert "disk is full" in failed["error"]
    assert failed["category"] == "server"
    folder = disk / "checkpoints" / model.replace(":", "@")
    assert not [path for path in folder.rglob("*") if path.is_file()], "what is of no use takes no room"
    ballast.unlink()
    time.sleep(0.3)
    assert "path" in wire.result(wire.post("save_weights", model_id=model, seq_id=4, path="large"))


def test_the_sdk_waits_for_room(server: ServerProcess, disk: Path) -> None:
    """A run that meets a full disk ends with the weights of one that does not."""
    service = tinker.ServiceClient(base_url=server.url, api_key="tml-local")

    def train(disturb=lambda: None) -> np.ndarray:
        training = service.create_lora_training_client(base_model="tiny", rank=4, seed=5).result()
        for number in range(3):
            if number == 1:
                disturb()
            done = training.forward_backward(batch(seed=number), "cross_entropy")
            training.optim_step(tinker.AdamParams(learning_rate=1e-2))
            done.result()
        return np.concatenate(logprobs(training.forward(batch(), "cross_entropy").result()))

    def fill_for_a_while() -> None:
        threading.Timer(3.0, fill(disk, leave=RESERVE // 2).unlink).start()
        time.sleep(1.5)  # the server looks at the disk once a second

    expected = train()
    np.testing.assert_array_equal(train(fill_for_a_while), expected)
    assert shutil.disk_usage(disk).free > RESERVE
    service.close("success").result()
