"""Other weights under a base model's name: what was made on the old ones is refused, all else goes on."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import httpx
import pytest
from conformance.server_process import ServerProcess, Wire
from tiny_models import write_model


def model_on(wire: Wire, base_model: str) -> str:
    fields = {"session_id": wire.session(), "model_seq_id": 0, "lora_config": {"rank": 4, "seed": 1}}
    return wire.result(wire.post("create_model", base_model=base_model, **fields))["model_id"]


def sampling_session(wire: Wire, **of: str) -> tuple[str, httpx.Response]:
    session = wire.session()
    fields = {"session_id": session, "sampling_session_seq_id": 0}
    return session, wire.post("create_sampling_session", **fields, **of)


def sample(wire: Wire, session: str) -> httpx.Response:
    body = {"prompt": {"chunks": [{"type": "encoded_text", "tokens": [5]}]}, "num_samples": 1}
    of = {"sampling_session_id": f"{session}:sample:0", "seq_id": time.time_ns() % 10**9}
    return wire.post("asample", **body, **of, sampling_params={"max_tokens": 1})


def refused(response: httpx.Response) -> bool:
    """A 400 that names the base model and what is wrong with it."""
    assert response.status_code == 400, response.text
    return "made on other weights than those that base model 'tiny' has now" in response.text


def test_models_and_checkpoints_made_on_other_weights_are_refused(tmp_path: Path, cache_dir: Path) -> None:
    tiny, other = (write_model(tmp_path / name, num_hidden_layers=1) for name in ("tiny", "other"))
    server = ServerProcess(tiny, tmp_path / "data", cache_dir, "--model", f"other={other}").start()
    wire = Wire(server.url, "tml-local")
    try:
        model, queued, on_other = wire.model(), wire.model(), model_on(wire, "other")
        wire.result(wire.forward_backward(model, 1))
        state = wire.result(wire.post("save_weights", model_id=model, seq_id=2, path="kept"))["path"]
        saved = wire.post("save_weights_for_sampler", model_id=model, seq_id=3, path="kept")
        path = wire.result(saved)["path"]
        session, made = sampling_session(wire, base_model="tiny")
        assert made.status_code == 200
        kept = wire.result(wire.post("save_weights", model_id=on_other, seq_id=1, path="kept"))["path"]
        assert wire.forward_backward(queued, 2).status_code == 200  # waits for the first
        assert server.stop() == 0

        write_model(tiny, num_hidden_layers=1, seed=9)
        server.start()
        assert refused(wire.forward_backward(model, 4))
        assert refused(wire.post("save_weights", model_id=model, seq_id=4, path="again"))
        assert refused(wire.forward_backward(queued, 1))
        new = {"session_id": wire.session(), "model_seq_id": 0, "optimizer": True}
        assert refused(wire.post("load_weights", path=state, **new))
        assert refused(sampling_session(wire, model_path=path)[1])
        assert refused(sample(wire, session))
        fresh = wire.model()
        assert "metrics" in wire.result(wire.forward_backward(fresh, 1))
        assert "metrics" in wire.result(wire.forward_backward(on_other, 2))
        assert wire.result(wire.post("load_weights", path=kept, **new))["model_id"]
        assert server.stop() == 0

        # The first weights again, in other files: what was made on them goes on, what came after does not.
        write_model(tiny, num_hidden_layers=1, shards=2)
        (tiny / "model.safetensors").unlink()
        server.start()
        wire.result(wire.optim_step(model, 5))  # the number that was refused is used up
        assert refused(wire.forward_backward(fresh, 2))
        session, made = sampling_session(wire, model_path=path)
        assert made.status_code == 200
        assert wire.result(sample(wire, session))["sequences"]
    finally:
        server.kill()


@pytest.mark.slow
def test_an_engine_does_not_come_back_on_other_weights(tmp_path: Path, cache_dir: Path) -> None:
    """The folder changes while the server runs, and its engine dies."""
    tiny = write_model(tmp_path / "tiny", num_hidden_layers=1)
    server = ServerProcess(tiny, tmp_path / "data", cache_dir).start()
    try:
        Wire(server.url, "tml-local").model()
        write_model(tiny, num_hidden_layers=1, seed=9)
        server.engine.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 60
        while "have changed since the server started" not in server.log:
            assert time.monotonic() < deadline, server.log
            time.sleep(0.2)
    finally:
        server.kill()
