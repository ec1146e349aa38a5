"""The routes' answers are as the OpenAPI document describes them: no key is missing, wrong, or undocumented.

The clients of these tests compare every answer (`documented.py`), here and in all other files of this folder.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from rest.clients import Tinkercloud

_TOKENS = [5, 6, 7, 8]
_DATUM = {
    "model_input": {"chunks": [{"tokens": _TOKENS}]},
    "loss_fn_inputs": {
        "target_tokens": {"data": [6, 7, 8, 9], "dtype": "int64"},
        "weights": {"data": [1.0] * 4, "dtype": "float32"},
    },
}
_PROMPT = {"prompt": {"chunks": [{"tokens": _TOKENS}]}, "sampling_params": {"max_tokens": 3, "seed": 1}}
_SCORES = {"prompt_logprobs": True, "topk_prompt_logprobs": 2, "topk_sample_logprobs": 2}


@pytest.fixture
def sdk(tinkercloud: Tinkercloud) -> Tinkercloud:
    """A client in the Tinker SDK's dialect, whose polls are answered in JSON."""
    tinkercloud.headers["X-API-Dialect"] = "tinker"
    return tinkercloud


def polled(client: Tinkercloud, path: str, /, **body: Any) -> dict[str, Any]:
    """Return a result, by the poll that the SDK uses."""
    request = {"request_id": client.ask(path, **body)["request_id"]}
    while (answer := client.post("/api/v1/retrieve_future", json=request)).status_code == 408:
        pass
    assert answer.status_code == 200, answer.text
    assert "error" not in answer.json(), answer.text
    return answer.json()


def test_answers_to_the_sdk(sdk: Tinkercloud) -> None:
    session = sdk.ask("create_session", tags=["answers"], sdk_version="0.38.0", user_metadata={"a": "b"})
    session_id = session["session_id"]
    asked = {"base_model": "tiny", "lora_config": {"rank": 4}}
    model = polled(sdk, "create_model", session_id=session_id, model_seq_id=0, **asked)["model_id"]
    of_model = {"model_id": model}
    batch = {"data": [_DATUM], "loss_fn": "cross_entropy"}
    polled(sdk, "forward", **of_model, seq_id=1, forward_input=batch)
    polled(sdk, "forward_backward", **of_model, seq_id=2, forward_backward_input=batch)
    assert polled(sdk, "optim_step", **of_model, seq_id=3, adam_params={})["step_count"] == 1
    assert polled(sdk, "abort_gradient_epoch", **of_model, seq_id=4)["success"]
    state = polled(sdk, "save_weights", **of_model, seq_id=5, path="state")["path"]
    sampler = polled(sdk, "save_weights_for_sampler", **of_model, seq_id=6, path="sampler")["path"]
    polled(sdk, "save_weights_for_sampler", **of_model, seq_id=7, sampling_session_seq_id=3)
    polled(sdk, "save_weights_external", **of_model, seq_id=8, path="external")
    polled(sdk, "load_weights", **of_model, seq_id=9, path=state)
    polled(sdk, "load_weights", session_id=session_id, model_seq_id=1, path=state, optimizer=False)
    sdk.ask("get_info", **of_model)
    for found in ({"tinker_path": state}, {"path": state}, {"path": state + "-not"}, {"path": sampler}):
        sdk.ask("weights_info", **found)

    sampled = {"sampling_session_seq_id": 0, "session_id": session_id, "model_path": sampler}
    sampling = sdk.ask("create_sampling_session", **sampled)["sampling_session_id"]
    of_sampler = {"sampling_session_id": sampling, **_PROMPT}
    polled(sdk, "asample", **of_sampler, seq_id=0, num_samples=2, **_SCORES)
    dense = {"data": [6, 7, 8], "dtype": "int64", "shape": [3, 1]}
    polled(sdk, "asample", **of_sampler, seq_id=1, target_prompt_logprobs=dense, prompt_alt_tokens_k=2)
    sparse = {
        "data": [6],
        "dtype": "int64",
        "shape": [3, 1],
        "sparse_crow_indices": [0, 1, 1, 1],
        "sparse_col_indices": [0],
    }
    polled(sdk, "asample", **of_sampler, seq_id=2, target_prompt_logprobs=sparse)
    target = {"type": "sampling_session", "sampling_session_id": sampling}
    assert sdk.ask("retrieve_futures", target=target)["completions"]
    pending = sdk.ask("asample", **of_sampler, seq_id=3)["request_id"]
    sdk.ask("cancel_future", request_id=pending)
    sdk.ask("join_sampling_session", sampling_session_id=sampling)
    sdk.get(f"/api/v1/samplers/{sampling}")

    infinite = {"weights": {"data": [3e38] * 4, "dtype": "float32"}}
    overflowing = _DATUM | {"loss_fn_inputs": _DATUM["loss_fn_inputs"] | infinite}
    batch = {"data": [overflowing], "loss_fn": "cross_entropy"}
    request = sdk.ask("forward_backward", **of_model, seq_id=10, forward_backward_input=batch)["request_id"]
    for dialect, status in (("tinker", 200), ("tinkercloud", 400)):
        headers = {"X-API-Dialect": dialect}
        while (failed := sdk.post(f"/api/v1/retrieve_future/{request}", headers=headers)).status_code == 408:
            pass
        assert (failed.status_code, failed.json()["status"]) == (status, "failed"), failed.text
    sdk.ask("session_heartbeat", session_id=session_id)
    for page in (
        "sessions",
        f"sessions/{session_id}",
        "training_runs",
        f"training_runs/{model}",
        "checkpoints",
    ):
        assert sdk.get(f"/api/v1/{page}").status_code == 200
    assert len(sdk.get(f"/api/v1/training_runs/{model}/checkpoints").json()["checkpoints"]) == 3
    sdk.put(f"/api/v1/sessions/{session_id}/project", json={"project_id": "p"})
    assert sdk.ask("sessions/search", session_id=session_id)["sessions"]
    other = sdk.ask("create_session", tags=[])["session_id"]
    assert sdk.ask("sessions/search", limit=1)["next_cursor"]
    assert sdk.get(f"/api/v1/sessions/{session_id}/trace_export").json()["status"] == "ready"
    assert sdk.get(f"/api/v1/sessions/{session_id}/trace").json()["traceEvents"]
    assert sdk.get(f"/api/v1/sessions/{other}/trace_export").json()["status"] == "failed"
    checkpoint = f"/api/v1/training_runs/{model}/checkpoints/sampler_weights/sampler"
    for method, of in (("POST", "/publish"), ("DELETE", "/publish")):
        assert sdk.request(method, checkpoint + of).status_code == 200
    assert sdk.put(checkpoint + "/ttl", json={"ttl_seconds": 3600}).status_code == 200
    redirect = sdk.get(checkpoint + "/archive")
    assert sdk.get(redirect.headers["location"]).content
    urls = sdk.get(checkpoint + "/external_weights_urls").json()["urls"]
    assert all(sdk.get(url).content for url in urls.values())
    copied = sdk.ask("copy_weights", source_path=state, session_id=session_id, model_seq_id=2)
    assert copied["tinker_path"] != state
    assert sdk.request("DELETE", checkpoint).status_code == 200
    sdk.ask(f"sessions/{session_id}/finish", reason={"type": "errored"}, detail="over")
    assert sdk.ask("sessions/search", session_id=session_id)["sessions"][0]["status"]["detail"] == "over"

    assert len(sdk.documented.seen) >= 35, sorted(sdk.documented.seen)


def test_answers_about_the_server_itself(tinkercloud: Tinkercloud) -> None:
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    used = {"starting_on": hour.isoformat(), "ending_before": (hour + timedelta(hours=1)).isoformat()}
    for page in ("/", "/health", "/healthz", "/metrics", "/api/v1/capabilities", "/api/v1/session_info"):
        assert tinkercloud.get(page).status_code == 200
    for page in ("/v1/models", "/v1/models/tiny", "/model_info", "/server_info", "/api/v1/auth/apikey/me"):
        assert tinkercloud.get(page).status_code == 200
    tinkercloud.done("create_model", base_model="tiny", lora_config={"rank": 4})
    assert tinkercloud.get("/api/v1/audit").json()["entries"]
    assert tinkercloud.get("/api/v1/billing/usage/events", params=used).status_code == 200
    assert tinkercloud.get("/api/v1/billing/usage/checkpoints/current").status_code == 200
    for page in ("client/config", "client/dynamic_config", "telemetry", "auth/token", "cleanup_futures"):
        tinkercloud.ask(page)
    assert tinkercloud.request("DELETE", "/api/v1/auth/apikey/me").status_code == 403
    assert tinkercloud.post("/connect_inference_endpoint").status_code == 410
    assert tinkercloud.post("/api/v1/get_info", json={"model_id": 5}).status_code == 422
    assert len(tinkercloud.documented.seen) >= 20, sorted(tinkercloud.documented.seen)


_COMPLETIONS = ("POST", "/v1/completions"), {"model": "tiny", "prompt": [_TOKENS, [5]], "max_tokens": 3}
_CHAT = (
    ("POST", "/v1/chat/completions"),
    {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 3},
)
_GENERATE = (
    ("POST", "/generate"),
    {"input_ids": _TOKENS, "sampling_params": {"max_new_tokens": 3, "ignore_eos": True}},
)
_SCORED = {
    "return_logprob": True,
    "logprob_start_len": 0,
    "top_logprobs_num": 2,
    "token_ids_logprob": [5, 6],
    "return_text_in_logprobs": True,
    "return_prompt_token_ids": True,
}


@pytest.mark.parametrize(
    ("asked", "more"),
    [
        (_COMPLETIONS, {}),
        (_COMPLETIONS, {"n": 2, "logprobs": 2, "echo": True}),
        (_COMPLETIONS, {"logprobs": 2, "stream_options": {"include_usage": True}}),
        (_CHAT, {}),
        (_CHAT, {"n": 2, "logprobs": True, "top_logprobs": 2}),
        (_GENERATE, {}),
        (_GENERATE, _SCORED),
        (_GENERATE, {"input_ids": [_TOKENS, [5]]} | _SCORED),
    ],
)
def test_samples_whole_and_streamed(
    tinkercloud: Tinkercloud, asked: tuple[tuple[str, str], dict[str, Any]], more: dict[str, Any]
) -> None:
    route, body = asked
    plain = {key: value for key, value in more.items() if key != "stream_options"}
    answer = tinkercloud.post(route[1], json=body | plain)
    assert answer.status_code == 200, answer.text
    if more.get("echo"):
        return
    with tinkercloud.stream("POST", route[1], json=body | more | {"stream": True}) as stream:
        assert tinkercloud.documented.check_events(route, stream.iter_lines()) >= 1
