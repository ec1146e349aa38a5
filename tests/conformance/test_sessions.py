"""Sessions from create_session to finish."""

from __future__ import annotations

import threading
import time

from conformance.server_process import ServerProcess, Wire


def test_a_finished_session(server: ServerProcess, wire: Wire) -> None:
    session = wire.session()
    model = wire.model(session)
    beat = wire.post("session_heartbeat", session_id=session).json()
    assert beat == {"type": "session_heartbeat", "session_id": session}
    unnamed = wire.result(
        wire.post("save_weights_for_sampler", model_id=model, seq_id=1, sampling_session_seq_id=0)
    )["sampling_session_id"]
    named = wire.result(wire.post("save_weights_for_sampler", model_id=model, seq_id=2, path="kept"))["path"]
    pending = wire.forward_backward(model, 3)
    listed = wire.http.get(f"/api/v1/sessions/{session}").json()
    assert (listed["training_run_ids"], listed["sampler_ids"]) == ([model], [unnamed])
    assert session in wire.http.get("/api/v1/sessions", params={"limit": 1000}).json()["sessions"]

    finish = {"reason": {"type": "success"}, "detail": None}
    assert wire.post(f"sessions/{session}/finish", **finish).status_code == 200
    assert wire.post(f"sessions/{session}/finish", **finish).status_code == 200
    assert "metrics" in wire.result(pending), "what was accepted still runs"
    assert wire.post("session_heartbeat", session_id=session).status_code == 410
    assert wire.optim_step(model, 4).status_code == 410
    assert wire.http.get(f"/api/v1/samplers/{unnamed}").status_code == 404
    assert wire.post("weights_info", tinker_path=named).status_code == 200
    assert wire.post("session_heartbeat", session_id="nobody").status_code == 404


def test_the_sdk_s_user_is_told_of_tied_embeddings(wire: Wire) -> None:
    """The message comes when the session begins: the SDK logs this one, and none of create_model's. Merging
    tools cannot merge the adapter of a tied unembedding."""
    made = wire.post("create_session", tags=[], sdk_version="0.38.0").json()
    assert made["info_message"].startswith("tiny: train_unembed:")
    assert "tinsmith checkpoints merge" in made["info_message"]
    asked = {"session_id": made["session_id"], "base_model": "tiny"}
    default = wire.post("create_model", model_seq_id=0, lora_config={"rank": 4}, **asked).json()
    assert "embeddings are tied" in default["warning_message"]
    without = {"rank": 4, "train_unembed": False}
    assert (
        "warning_message"
        not in wire.post("create_model", model_seq_id=1, lora_config=without, **asked).json()
    )


def test_a_number_that_a_copied_checkpoint_has_is_not_a_model_s(wire: Wire) -> None:
    session = wire.session()
    model = wire.model(session)
    saved = wire.result(wire.post("save_weights_for_sampler", model_id=model, seq_id=1, path="kept"))["path"]
    copy = {"source_path": saved, "session_id": session}
    assert wire.post("copy_weights", model_seq_id=0, **copy).status_code == 400, "the model's own number"
    assert wire.post("copy_weights", model_seq_id=1, **copy).status_code == 200
    taken = {"session_id": session, "base_model": "tiny", "lora_config": {"rank": 4}}
    refused = wire.post("create_model", model_seq_id=1, **taken)
    assert (refused.status_code, "use the next one" in refused.text) == (400, True)
    assert wire.model(session, 2).endswith(":2")


def test_the_probe_routes(server: ServerProcess, wire: Wire) -> None:
    assert wire.post("client/config", sdk_version="0.38.0").json()["parallel_fwdbwd_chunks"] is True
    assert wire.post("client/dynamic_config", sdk_version="0.38.0").json()["refresh_interval_sec"] > 0
    assert wire.post("telemetry", events=[], session_id="x").json() == {"status": "accepted"}
    (model,) = wire.http.get("/api/v1/get_server_capabilities").json()["supported_models"]
    assert (model["model_name"], model["max_context_length"]) == ("tiny", 512)


def test_cancelled_samples_fail(wire: Wire) -> None:
    made = wire.post(
        "create_sampling_session", session_id=wire.session(), sampling_session_seq_id=0, base_model="tiny"
    )
    submitted = wire.post(
        "asample",
        sampling_session_id=made.json()["sampling_session_id"],
        seq_id=0,
        num_samples=16,
        prompt={"chunks": [{"type": "encoded_text", "tokens": [5] * 100}]},
        sampling_params={"max_tokens": 400, "stop": []},
    )
    assert wire.post("cancel_future", request_id=submitted.json()["request_id"]).status_code == 200
    assert wire.post("cancel_future", request_id="req_unknown").status_code == 200
    answer = wire.result(submitted)
    assert answer.get("category") == "user", "it was not finished within the first milliseconds"


def test_a_silent_session_s_models_rest_and_come_back(make_server) -> None:
    """Only those of silent sessions, with their gradients and moments, and as if they had never left."""
    server: ServerProcess = make_server(TINSMITH_SESSION_IDLE_SECONDS="2").start()
    wire = Wire(server.url, "tml-local")
    session = wire.session()
    stop = threading.Event()

    def beat() -> None:
        client = Wire(server.url, "tml-local")
        while not stop.wait(0.2):
            client.post("session_heartbeat", session_id=session)

    heart = threading.Thread(target=beat, daemon=True)
    heart.start()
    silent, awake = wire.model(), wire.model(session)
    for model in (silent, awake):
        wire.result(wire.forward_backward(model, 1))
        wire.result(wire.optim_step(model, 2, learning_rate=1e-2))
        wire.result(wire.forward_backward(model, 3))
    deadline = time.monotonic() + 30
    while f"{silent}: DeleteModel" not in server.log and time.monotonic() < deadline:
        time.sleep(0.1)
    assert f"{silent}: DeleteModel" in server.log, "the engine has forgotten it"
    assert f"model {silent} rests" in server.log
    assert f"model {awake} rests" not in server.log

    back, there = (wire.result(wire.optim_step(model, 4, learning_rate=1e-2)) for model in (silent, awake))
    assert back["metrics"] == there["metrics"]
    back, there = (wire.result(wire.forward_backward(model, 5)) for model in (silent, awake))
    assert back | {"model_id": awake} == there
    stop.set()
    heart.join()
    assert server.stop() == 0
