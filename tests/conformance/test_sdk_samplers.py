"""Sampling sessions of unnamed weights: what they sample, whatever is trained, saved or killed meanwhile."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator

import numpy as np
import pytest
import tinker
from conformance.batches import batch
from conformance.server_process import ServerProcess, Wire
from conformance.test_sdk_checkpoints import PROMPT
from conformance.test_sdk_training import step


def scores(sampler: tinker.SamplingClient) -> np.ndarray:
    return np.asarray(sampler.compute_logprobs(PROMPT).result()[1:])


def unnamed(training: tinker.TrainingClient, kind: str = "snapshot") -> tinker.SamplingClient:
    return training.save_weights_and_get_sampling_client(kind=kind).result()


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["server", "engine"])
def test_unnamed_weights_outlive_a_kill_before_they_are_on_disk(make_server, killed: str) -> None:
    """They are made again by a replay; named ones were on disk."""
    server: ServerProcess = make_server().start()
    service = tinker.ServiceClient(base_url=server.url, api_key="tml-local")
    training = service.create_lora_training_client(base_model="tiny", rank=4, seed=7).result()
    step(training, batch())
    blocked = server.data_dir / "samplers"
    blocked.write_text("no directory can be made below a file")
    first = unnamed(training)
    expected = [scores(first)]
    step(training, batch())
    second = unnamed(training)
    path = training.save_weights_for_sampler("kept").result().path
    named = service.create_sampling_client(model_path=path).result()
    step(training, batch())

    server.engine.suspend()  # a sample that was accepted and is not answered
    waiting = second.compute_logprobs(PROMPT)
    while "sample" not in _accepted(server):
        time.sleep(0.02)
    if killed == "server":
        server.kill()
    else:
        server.engine.kill()
    blocked.unlink()
    if killed == "server":
        server.start()

    expected.append(np.asarray(waiting.result()[1:]))
    np.testing.assert_allclose(scores(first), expected[0], atol=1e-5)
    np.testing.assert_allclose(scores(named), expected[1], atol=1e-4)
    assert np.abs(expected[1] - expected[0]).max() > 1e-3
    assert "unnamed sampler weights of" in server.log
    assert np.isfinite(step(training, batch()))
    assert server.stop() == 0
    assert len(list(blocked.glob("*/*/adapter_model.safetensors"))) == 2


def _accepted(server: ServerProcess) -> set[str]:
    """The kinds of operations that the ledger has accepted and that are not answered."""
    ledger = sqlite3.connect(server.data_dir / "ledger.db")
    kinds = {kind for (kind,) in ledger.execute("SELECT kind FROM operations WHERE state = 'accepted'")}
    ledger.close()
    return kinds


def test_inflight_clients_move_with_later_saves_and_snapshots_do_not(
    service: tinker.ServiceClient, training: tinker.TrainingClient
) -> None:
    other = service.create_lora_training_client(base_model="tiny", rank=4, seed=8).result()
    step(other, batch())
    others = unnamed(other, "inflight")
    elsewhere = scores(others)

    step(training, batch())
    snapshot, early = unnamed(training), unnamed(training, "inflight")
    before = scores(snapshot)
    np.testing.assert_allclose(scores(early), before, atol=1e-5)
    step(training, batch())
    np.testing.assert_allclose(scores(early), before, atol=1e-5, err_msg="only a save publishes")
    unnamed(training)
    np.testing.assert_allclose(scores(early), before, atol=1e-5, err_msg="only an inflight save does")
    late = unnamed(training, "inflight")
    after = scores(late)
    assert np.abs(after - before).max() > 1e-3
    np.testing.assert_allclose(scores(early), after, atol=1e-5)
    np.testing.assert_allclose(scores(snapshot), before, atol=1e-5)
    np.testing.assert_allclose(scores(others), elsewhere, atol=1e-5, err_msg="of another model")


@pytest.fixture(scope="module")
def strict(make_server) -> Iterator[ServerProcess]:
    """Sampler weights stay for half a second; a key may have four samples waiting."""
    keys = ("--api-key", "alice=tml-alice", "--api-key", "bob=tml-bob")
    limits = {"TINSMITH_SAMPLER_IDLE_SECONDS": "0.5", "TINSMITH_MAX_WAITING_SAMPLES": "4"}
    server = make_server(*keys, **limits).start()
    yield server
    assert server.stop() == 0


@pytest.mark.slow
def test_idle_samplers_leave_the_device_and_come_back(strict: ServerProcess) -> None:
    service = tinker.ServiceClient(base_url=strict.url, api_key="tml-alice")
    training = service.create_lora_training_client(base_model="tiny", rank=4, seed=7).result()
    step(training, batch())
    sampler = unnamed(training)
    expected = scores(sampler)
    deadline = time.monotonic() + 30
    while "leave the device" not in strict.log and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "leave the device" in strict.log
    np.testing.assert_allclose(scores(sampler), expected, atol=1e-4)
    service.close("success").result()


def test_a_crowd_is_told_to_wait_and_all_of_it_is_served(strict: ServerProcess) -> None:
    service = tinker.ServiceClient(base_url=strict.url, api_key="tml-alice")
    sampler = service.create_sampling_client(base_model="tiny").result()
    params = tinker.SamplingParams(max_tokens=2, temperature=0.0)
    strict.engine.suspend()
    crowd = [sampler.sample(tinker.ModelInput.from_ints(PROMPT.to_ints()), 1, params) for _ in range(12)]
    alice, bob = Wire(strict.url, "tml-alice"), Wire(strict.url, "tml-bob")
    fields = {"base_model": "tiny", "prompt": {"tokens": [5, 6, 7]}, "sampling_params": {"max_tokens": 1}}
    deadline = time.monotonic() + 30
    while (refused := alice.post("asample", **fields)).status_code == 200 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert refused.status_code == 429
    assert float(refused.headers["retry-after"]) > 0
    assert "samples of this key's tenant are waiting" in refused.json()["error"]
    others = bob.post("asample", **fields)
    assert others.status_code == 200, "of another key"
    strict.engine.resume()
    assert "sequences" in bob.result(others)
    answers = [future.result().sequences[0].tokens for future in crowd]
    assert answers == [answers[0]] * 12
    service.close("success").result()
