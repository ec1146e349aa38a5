"""A stop and a start, and clients that go on as if nothing had happened."""

from __future__ import annotations

import signal
import threading

import numpy as np
import psutil
import pytest
import tinker
from conformance.batches import batch
from conformance.server_process import ServerProcess, Wire
from conformance.test_sdk_checkpoints import PROMPT, forward
from conformance.test_sdk_training import step


@pytest.fixture(scope="module")
def server(make_server) -> ServerProcess:
    """The server of two tests; the first leaves it running, the second stopped."""
    return make_server().start()


def test_a_stop_finishes_what_runs_and_answers_its_polls(server: ServerProcess) -> None:
    wire = Wire(server.url, "tml-local")
    model = wire.model()
    submitted = wire.forward_backward(model, 1)
    answers: list = []
    poll = threading.Thread(target=lambda: answers.append(wire.poll(submitted.json()["request_id"])))
    poll.start()
    assert server.stop() == 0
    poll.join()
    assert answers[0].status_code in (200, 408)
    server.start()
    assert "metrics" in wire.result(submitted)


def test_everything_is_there_after_a_restart(server: ServerProcess) -> None:
    service = tinker.ServiceClient(base_url=server.url, api_key="tml-local")
    data = batch()
    training = service.create_lora_training_client(base_model="tiny", rank=4, seed=7).result()
    twin = service.create_lora_training_client(base_model="tiny", rank=4, seed=7).result()
    for client in (training, twin):
        step(client, data)
    path = training.save_state("kept").result().path
    unnamed = training.save_weights_and_get_sampling_client().result()
    named = training.save_weights_for_sampler("kept").result().path
    scored = unnamed.compute_logprobs(PROMPT).result()[1:]
    # The twin never sees a restart between its second gradient and its second step.
    twin.forward_backward(data, "cross_entropy").result()
    training.forward_backward(data, "cross_entropy").result()
    twin.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
    expected = forward(twin, data)

    for process in psutil.Process(server.process.pid).children():  # as many service managers do
        process.send_signal(signal.SIGTERM)
    assert server.stop(signal.SIGINT) == 0, server.log
    assert "everything is saved" in server.log
    assert "dead" not in server.log
    server.start()

    training.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
    np.testing.assert_array_equal(forward(training, data), expected)
    np.testing.assert_array_equal(forward(twin, data), expected)
    np.testing.assert_array_equal(unnamed.compute_logprobs(PROMPT).result()[1:], scored)
    again = service.create_sampling_client(model_path=named).result()
    np.testing.assert_array_equal(again.compute_logprobs(PROMPT).result()[1:], scored)
    loaded = service.create_training_client_from_state(path).result()
    assert np.isfinite(step(loaded, data))
    service.close("success").result()
    assert server.stop() == 0
    assert not list((server.data_dir / "samplers").glob("*/*")), "unnamed weights go with their session"


@pytest.mark.slow
def test_answers_and_unfinished_operations_outlive_a_kill(make_server) -> None:
    """An accepted operation runs after the next start, on the state that it would have had."""
    server = make_server(TINSMITH_LONG_POLL_SECONDS="5").start()
    wire = Wire(server.url, "tml-local")
    model, twin = wire.model(), wire.model()
    for each in (model, twin):
        wire.result(wire.forward_backward(each, 1))
    expected = wire.result(wire.optim_step(twin, 2, learning_rate=1e-2))["metrics"]
    after = wire.result(wire.forward_backward(twin, 3))["metrics"]
    first = wire.forward_backward(model, 1)
    early = wire.forward_backward(model, 3)

    server.kill()
    server.start()

    assert wire.forward_backward(model, 1).json() == first.json()
    assert "metrics" in wire.result(first)
    assert wire.result(wire.optim_step(model, 2, learning_rate=1e-2))["metrics"] == expected
    assert wire.result(early)["metrics"] == after
    assert server.stop() == 0
