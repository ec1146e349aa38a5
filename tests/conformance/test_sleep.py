"""POST /sleep and /wake_up: nothing is lost, whatever happens meanwhile."""

from __future__ import annotations

import signal

import pytest
from conformance.server_process import ServerProcess, Wire


@pytest.mark.slow
def test_asleep_it_works_on_and_dies_like_awake(make_server) -> None:
    server: ServerProcess = make_server().start()
    wire = Wire(server.url, "tml-local")
    model = wire.model()
    wire.result(wire.forward_backward(model, 1))
    wire.result(wire.optim_step(model, 2, learning_rate=0.1))
    want = wire.result(wire.forward_backward(model, 3, forward_only=True))

    slept = wire.http.post("/sleep").json()
    assert slept["success"]
    assert slept["result"]["status"] == "sleeping"
    assert slept["result"]["bytes_on_device"] < 1e-3 * slept["result"]["bytes"]
    assert server.health()["status"] == "healthy"
    again = wire.result(wire.forward_backward(model, 4, forward_only=True))  # it wakes
    assert again["loss_fn_outputs"] == want["loss_fn_outputs"]

    assert wire.http.post("/sleep").json()["result"]["bytes"] > 0
    woken = wire.http.post("/wake_up").json()["result"]
    assert woken["status"] == "awake"
    assert woken["bytes"] == slept["result"]["bytes"]

    wire.http.post("/sleep")
    server.engine.kill()  # and the server with it
    assert server.process is not None
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    server.start()
    after = wire.result(wire.forward_backward(model, 5, forward_only=True))
    assert after["loss_fn_outputs"] == want["loss_fn_outputs"]
    assert server.stop() == 0
