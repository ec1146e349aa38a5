"""Kills in the middle of writes, damaged files, a locked database: training ends as if nothing had been."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import tinker
from conformance.batches import batch, logprobs
from conformance.server_process import ServerProcess, Wire

SNAPSHOT_OPERATIONS = 4


@pytest.fixture(scope="module")
def server(make_server) -> ServerProcess:
    return make_server(
        TINSMITH_SNAPSHOT_OPERATIONS=str(SNAPSHOT_OPERATIONS),
        TINSMITH_DEATHS_PER_OPERATION="1000",  # no operation is to blame
        TINSMITH_LONG_POLL_SECONDS="2",
    ).start()


@pytest.fixture(scope="module")
def service(server: ServerProcess) -> Iterator[tinker.ServiceClient]:
    client = tinker.ServiceClient(base_url=server.url, api_key="tml-local")
    yield client
    client.close("success").result()


def train(
    training: tinker.TrainingClient, steps: range, before: Callable[[int], None] = lambda _: None
) -> np.ndarray:
    """The log-probs after the steps."""
    for number in steps:
        before(number)
        done = training.forward_backward(batch(seed=number), "cross_entropy")
        training.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
        done.result()
    return np.concatenate(logprobs(training.forward(batch(), "cross_entropy").result()))


@pytest.fixture(scope="module")
def expected(service: tinker.ServiceClient) -> np.ndarray:
    """The weights after eight steps without a fault."""
    return train(new_model(service), range(8))


def new_model(service: tinker.ServiceClient) -> tinker.TrainingClient:
    return service.create_lora_training_client(base_model="tiny", rank=4, seed=5).result()


def kill_when_it_writes(server: ServerProcess, folder: str) -> threading.Thread:
    """Kills the engine as soon as it has begun to write a directory there."""
    engine, root = server.engine, server.data_dir / folder

    def kill() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if any(".orbax-checkpoint-tmp" in path.name for path in root.glob("**/*") if path.is_dir()):
                engine.kill()
                return

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
def test_a_kill_while_a_snapshot_is_written(
    server: ServerProcess, service: tinker.ServiceClient, expected: np.ndarray
) -> None:
    lives = server.health()["engine"]["lives"]
    killers = []

    def before(step: int) -> None:
        if step == 1:
            killers.append(kill_when_it_writes(server, "snapshots"))

    survived = train(new_model(service), range(8), before)
    killers[0].join()
    np.testing.assert_array_equal(survived, expected)
    assert server.health()["engine"]["lives"] == lives + 1


@pytest.mark.slow
def test_a_kill_while_a_checkpoint_is_written(
    server: ServerProcess, service: tinker.ServiceClient, expected: np.ndarray
) -> None:
    training = new_model(service)
    before = train(training, range(5))
    lives = server.health()["engine"]["lives"]
    killer = kill_when_it_writes(server, "checkpoints")
    path = training.save_state("cut").result().path
    killer.join()
    assert server.health()["engine"]["lives"] == lives + 1
    loaded = service.create_training_client_from_state_with_optimizer(path).result()
    np.testing.assert_array_equal(train(loaded, range(0)), before)
    np.testing.assert_array_equal(train(loaded, range(5, 8)), expected)


def snapshots(server: ServerProcess, model_id: str) -> tuple[Path, Path]:
    """The newest and the one before it, once there are two."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with sqlite3.connect(server.data_dir / "ledger.db") as ledger:
            query = "SELECT snapshot, older_snapshot FROM models WHERE id = ?"
            found = ledger.execute(query, [model_id]).fetchone()
        if None not in found:
            return server.data_dir / found[0], server.data_dir / found[1]
        time.sleep(0.1)
    raise TimeoutError


def files(directory: Path) -> list[Path]:
    return [path for path in (directory / "arrays").rglob("*") if path.is_file() and path.stat().st_size]


def truncate(directory: Path) -> None:
    """Half of every file of arrays is gone."""
    for path in files(directory):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(directory: Path) -> None:
    """Flip one bit of the largest file."""
    path = max(filter(Path.is_file, directory.rglob("*")), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[-len(content) // 3] ^= 1
    path.write_bytes(content)


def kill_engine(server: ServerProcess) -> None:
    engine = server.engine
    engine.kill()
    psutil.wait_procs([engine], timeout=10)


@pytest.mark.slow
def test_a_damaged_snapshot_is_not_the_end(
    server: ServerProcess, service: tinker.ServiceClient, expected: np.ndarray
) -> None:
    training, other = new_model(service), new_model(service)
    train(training, range(5))
    train(other, range(2))
    newest, _older = snapshots(server, training.model_id)
    flip_a_bit(newest)
    kill_engine(server)
    np.testing.assert_array_equal(train(training, range(5, 8)), expected)
    assert "cannot be read" in server.log

    for path in snapshots(server, training.model_id):
        truncate(path)
    kill_engine(server)
    with pytest.raises(tinker.RequestFailedError, match="could not be brought back"):
        training.forward(batch(), "cross_entropy").result()
    np.testing.assert_array_equal(train(other, range(2, 8)), expected)


def test_damaged_sampler_weights_are_not_sampled_from(
    server: ServerProcess, service: tinker.ServiceClient
) -> None:
    training = new_model(service)
    damaged, whole = (training.save_weights_for_sampler(name).result().path for name in ("damaged", "whole"))
    with sqlite3.connect(server.data_dir / "ledger.db") as ledger:
        (directory,) = ledger.execute("SELECT directory FROM checkpoints WHERE name = 'damaged'").fetchone()
    flip_a_bit(server.data_dir / directory)
    kill_engine(server)
    prompt = tinker.ModelInput.from_ints([5, 6, 7])
    with pytest.raises(tinker.RequestFailedError, match="damaged"):
        service.create_sampling_client(damaged).compute_logprobs(prompt).result()
    assert len(service.create_sampling_client(whole).compute_logprobs(prompt).result()) == 3


def test_a_database_that_is_locked_for_a_while_is_waited_for(server: ServerProcess) -> None:
    wire = Wire(server.url, "tml-local")
    model = wire.model()
    intruder = sqlite3.connect(server.data_dir / "ledger.db", isolation_level=None)
    intruder.execute("BEGIN EXCLUSIVE")
    submitted: list = []
    submit = threading.Thread(target=lambda: submitted.append(wire.forward_backward(model, 1)))
    submit.start()
    time.sleep(1.5)
    assert not submitted, "nothing is accepted that is not written"
    assert server.health()["status"] == "healthy"
    intruder.execute("ROLLBACK")
    submit.join()
    assert "metrics" in wire.result(submitted[0])


def test_a_database_that_is_gone_for_a_while_takes_nothing_and_loses_nothing(server: ServerProcess) -> None:
    wire = Wire(server.url, "tml-local")
    model = wire.model()
    first = wire.result(wire.forward_backward(model, 1))
    ledger, away = server.data_dir / "ledger.db", server.data_dir / "away.db"
    ledger.rename(away)
    refused = wire.forward_backward(model, 2)
    assert (refused.status_code, "ledger.db is gone" in refused.text) == (503, True)
    assert refused.headers["Retry-After"]
    assert not ledger.exists(), "no empty one is made in its place"
    away.rename(ledger)
    assert wire.result(wire.forward_backward(model, 2))["metrics"] == first["metrics"]
    server.kill()
    server.start()
    assert "metrics" in wire.result(wire.optim_step(model, 3, learning_rate=1e-3))
