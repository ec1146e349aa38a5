"""A real server on this machine's devices, whose engine is killed: the run ends where it would have ended.

It has a process of its own in `make gpu`: the tests of this process must not hold the device that the server
wants.
"""

import os

import pytest
from conformance.server_process import ServerProcess, Wire, datum
from tiny_models import write_model


@pytest.fixture
def server(tmp_path):
    model = write_model(tmp_path / "tiny", "qwen3", head_dim=64, num_hidden_layers=2)
    platforms = os.environ.get("JAX_PLATFORMS", "")
    running = ServerProcess(
        model,
        tmp_path / "data",
        tmp_path / "cache",
        JAX_PLATFORMS=platforms,
        TINSMITH_LONG_POLL_SECONDS="2",
    ).start()
    yield running
    running.kill()


def test_a_run_whose_engine_is_killed_ends_with_the_same_bits(server):
    """Both runs are asked for the same steps; while the second one's are under way, the engine dies."""
    wire = Wire(server.url, "tml-local")
    left_alone, killed = wire.model(), wire.model()

    def steps(model, between=lambda step: None):
        for step in range(3):
            done = wire.forward_backward(model, 2 * step + 1, [datum(), datum(tokens=(9, 8, 7, 6))])
            between(step)
            stepped = wire.optim_step(model, 2 * step + 2, learning_rate=1e-2)
            wire.result(done)
            metrics = wire.result(stepped)["metrics"]
        last = wire.result(wire.forward_backward(model, 7))
        return metrics, last["metrics"], last["loss_fn_outputs"]

    expected = steps(left_alone)
    assert steps(killed, lambda step: step == 1 and server.engine.kill()) == expected
    assert server.health()["engine"]["lives"] == 2
    assert server.stop() == 0
