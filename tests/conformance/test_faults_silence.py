"""An engine that hangs is replaced; one that only seems to is not."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import numpy as np
import pytest
import tinker
from conformance.batches import batch, logprobs
from conformance.server_process import ServerProcess

SILENCE_SECONDS = 5


@pytest.fixture(scope="module")
def listening(make_server) -> ServerProcess:
    return make_server(
        TINSMITH_ENGINE_SILENCE_SECONDS=str(SILENCE_SECONDS), TINSMITH_LONG_POLL_SECONDS="2"
    ).start()


@pytest.fixture
def service(listening: ServerProcess) -> Iterator[tinker.ServiceClient]:
    client = tinker.ServiceClient(base_url=listening.url, api_key="tml-local")
    yield client
    client.close("success").result()


def train(service: tinker.ServiceClient, disturb=lambda: None) -> np.ndarray:
    """Four steps, disturbed while the third is computed: the final log-probs."""
    training = service.create_lora_training_client(base_model="tiny", rank=4, seed=5).result()
    for number in range(4):
        done = training.forward_backward(batch(seed=number), "cross_entropy")
        if number == 2:
            disturb()
        training.optim_step(tinker.AdamParams(learning_rate=1e-2))
        done.result()
    return np.concatenate(logprobs(training.forward(batch(), "cross_entropy").result()))


@pytest.mark.slow
def test_an_engine_that_is_stopped_is_replaced(
    listening: ServerProcess, service: tinker.ServiceClient
) -> None:
    expected = train(service)
    lives = listening.health()["engine"]["lives"]
    stopped = train(service, lambda: listening.engine.suspend())
    np.testing.assert_array_equal(stopped, expected)
    assert listening.health()["engine"]["lives"] == lives + 1
    assert "no sign of life" in listening.log


def test_a_server_that_was_stopped_kills_no_engine(
    listening: ServerProcess, service: tinker.ServiceClient
) -> None:
    lives = listening.health()["engine"]["lives"]
    assert listening.process is not None
    listening.process.send_signal(signal.SIGSTOP)
    time.sleep(SILENCE_SECONDS + 1.5)
    listening.process.send_signal(signal.SIGCONT)
    train(service)
    assert listening.health()["engine"]["lives"] == lives
