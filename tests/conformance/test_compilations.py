"""While the engine compiles, health, polls and the log say what and for how long."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import openai
import pytest
import tinker
from conformance.batches import batch
from conformance.server_process import ServerProcess, Wire
from tinker.lib import queue_state_logger

ServerMaker = Callable[..., ServerProcess]
_DATUM = {
    "model_input": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3, 4]}]},
    "loss_fn_inputs": {
        "target_tokens": {"data": [2, 3, 4, 5], "dtype": "int64", "shape": [4]},
        "weights": {"data": [1.0] * 4, "dtype": "float32", "shape": [4]},
    },
}


def test_a_compilation_is_reported_while_it_lasts(
    make_server: ServerMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And the SDK logs what is compiled, and for how long, when a pause has lasted too long for it."""
    server = make_server("--cache-dir", str(tmp_path / "empty"), TINSMITH_LONG_POLL_SECONDS="0").start()
    wire = Wire(server.url, None)
    model = wire.model()
    seen: set[str] = set()
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            engine = (server.health() or {}).get("engine", {})
            if engine.get("phase") == "compiling":
                assert engine["ready"]
                seen.add(engine["text"])
            time.sleep(0.02)

    watching = threading.Thread(target=look)
    watching.start()
    submitted = wire.post(
        "forward_backward",
        model_id=model,
        seq_id=1,
        forward_backward_input={"data": [_DATUM], "loss_fn": "cross_entropy"},
    ).json()
    reasons = set()
    while (answer := wire.post("retrieve_future", request_id=submitted["request_id"])).status_code == 408:
        reasons.add(answer.json()["queue_state_reason"])
        time.sleep(0.02)
    over.set()
    watching.join()
    assert "error" not in answer.json()
    told = re.compile(r"compiling forward_backward .*, for \d+ s")
    assert any(told.fullmatch(text) for text in seen)
    assert any(told.fullmatch(text) for text in reasons)
    health = server.health()
    assert health is not None
    assert health["engine"]["phase"] == "ready"
    assert re.fullmatch(r"compiled .* in \d+\.\d s", health["engine"]["text"])
    assert "compiling forward_backward" in server.log

    monkeypatch.setattr(queue_state_logger, "PAUSE_GRACE_PERIOD", 0.0)  # 15 minutes
    service = tinker.ServiceClient(base_url=server.url, api_key="tml-local")
    with caplog.at_level(logging.WARNING, queue_state_logger.__name__):
        training = service.create_lora_training_client("tiny", rank=16).result()
        training.forward_backward(batch(1), "cross_entropy").result()
    service.close("success").result()
    logged = re.compile(r"Training for \S+ is paused\. Reason: compiling forward_backward .*, for \d+ s\.")
    assert any(logged.fullmatch(message) for message in caplog.messages), caplog.messages


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/completions", {"model": "tiny", "prompt": "Once", "max_tokens": 3}),
        ("/generate", {"text": "Once", "sampling_params": {"max_new_tokens": 3}}),
    ],
)
def test_a_stream_is_not_silent_while_its_samples_wait(
    make_server: ServerMaker, path: str, asked: dict[str, object], tmp_path: Path
) -> None:
    """The first sample waits for its programs."""
    options = ("--cache-dir", str(tmp_path / "empty"), "--stream-keep-alive-seconds", "0.05")
    server = make_server(*options).start()
    lines: list[str] = []
    with httpx.stream("POST", server.url + path, json=asked | {"stream": True}, timeout=120) as answer:
        lines.extend(filter(None, answer.iter_lines()))
    comments = [line for line in lines if line.startswith(":")]
    assert len(comments) > 3
    assert all(line.startswith("data: ") for line in lines if line not in comments)
    assert lines[-1] == "data: [DONE]"
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    chunks = client.completions.create(model="tiny", prompt="Upon", max_tokens=40, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks)


def test_after_a_warm_up_nothing_is_compiled_for_ordinary_requests(
    make_server: ServerMaker, tmp_path: Path
) -> None:
    options = ("--warm-up", "--warm-up-rank", "4", "--max-sequence-length", "128")
    server = make_server("--cache-dir", str(tmp_path / "empty"), *options).start()
    deadline = time.monotonic() + 300
    while "warmed up in" not in server.log:
        assert time.monotonic() < deadline, server.log
        time.sleep(0.2)
    assert "failed" not in server.log
    assert "compiling forward_backward" in server.log
    compiled = server.log.count("compiling")
    wire = Wire(server.url, None)
    model = wire.model(rank=4)
    wire.result(
        wire.post(
            "forward_backward",
            model_id=model,
            seq_id=1,
            forward_backward_input={"data": [_DATUM], "loss_fn": "cross_entropy"},
        )
    )
    wire.result(wire.post("optim_step", model_id=model, seq_id=2, adam_params={}))
    saved = wire.result(wire.post("save_weights_for_sampler", model_id=model, path="s", seq_id=3))
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]}
    params = {"max_tokens": 3, "temperature": 0.5}
    for weights in ({"model_path": saved["path"]}, {"base_model": "tiny"}):
        sampled = wire.post("asample", prompt=prompt, num_samples=1, sampling_params=params, **weights)
        assert len(wire.result(sampled)["sequences"][0]["tokens"]) <= 3
    assert server.log.count("compiling") == compiled, server.log
    assert wire.http.get("/api/v1/training_runs").json()["cursor"]["total_count"] == 1
    assert not list((server.data_dir / "checkpoints").glob("warm-up*"))
