"""The sequences of tinkercloud's own clients, call by call."""

from __future__ import annotations

import json
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from conformance.server_process import ServerProcess, Wire
from rest.clients import ALICE, BOB, Tinkercloud
from tiny_models import EOS_ID

TOKENS = [5, 6, 7, 8, 9, 10, 11, 12]


def finished(client: Tinkercloud, path: str, **body: Any) -> dict[str, Any]:
    """The loop on tinkercloud's page: ask until `status` is completed, and take the `result`."""
    request_id = client.post(f"/api/v1/{path}", json=body).json()["request_id"]
    until = time.monotonic() + 120
    while time.monotonic() < until:
        polled = client.post(f"/api/v1/retrieve_future/{request_id}").json()
        assert polled["status"] in ("pending", "completed"), polled
        if polled["status"] == "completed":
            return polled["result"]
    raise TimeoutError(path)


def test_the_page_from_top_to_bottom(tinkercloud: Tinkercloud) -> None:
    """The requests are in the page's order, with a session id that nothing has created."""
    session = {"session_id": "abc-123"}
    lora = {"rank": 4, "train_mlp": True, "train_attn": True, "train_unembed": True}
    created = finished(
        tinkercloud,
        "create_model",
        **session,
        model_seq_id=0,
        model_name="tiny",
        lora_config=lora,
        max_batch_size=256,
        max_seq_len=4096,
        checkpoint_path=None,
    )
    assert created["status"] == "ready"
    assert "max_seq_len: 4096" in created["warning_message"]
    assert "512 tokens" in created["warning_message"]
    assert "train_unembed: this base model's embeddings are tied" in created["warning_message"]
    model = {"model_id": created["model_id"]}
    info = tinkercloud.ask("get_info", **model)["model_data"]
    assert (info["model_name"], info["lora_rank"]) == ("tiny", 4)
    sft = {
        "model_input": {"chunks": [{"tokens": [1, 2, 3, 4, 5]}]},
        "loss_fn_inputs": {"target_tokens": {"data": [3, 4, 5], "dtype": "int64"}},
    }
    forward = finished(tinkercloud, "forward", **model, data=[sft], loss_fn="cross_entropy")
    logprobs = forward["loss_fn_outputs"][0]["logprobs"]["data"]
    assert forward["metrics"]["loss:sum"] == pytest.approx(-sum(logprobs), rel=1e-5)
    rl = {
        "model_input": {"chunks": [{"tokens": [1, 2, 3, 4, 5, 6, 7, 8]}]},
        "loss_fn_inputs": {
            "target_tokens": {"data": [5, 6, 7, 8], "dtype": "int64"},
            "logprobs": {"data": [-2.1, -1.8, -3.2, -2.5], "dtype": "float32"},
            "advantages": {"data": [0.5, -0.3, 0.8, 0.2], "dtype": "float32"},
        },
    }
    trained = finished(tinkercloud, "forward_backward", **model, data=[rl], loss_fn="importance_sampling")
    assert {"loss:sum", "ppo_kl", "pg_clipfrac"} <= trained["metrics"].keys()
    adam = {"learning_rate": 1e-6, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.01}
    stepped = finished(tinkercloud, "optim_step", **model, adam_params=adam)
    assert (stepped["learning_rates"], repr(stepped["step_count"])) == ([1e-6], "1")
    sample = {
        "prompt": {"chunks": [{"tokens": [1, 2, 3]}]},
        "num_samples": 1,
        "sampling_params": {"max_tokens": 8, "temperature": 0.7, "top_p": 0.9, "stop": ["<|endoftext|>"]},
        "include_prompt_logprobs": False,
    }
    sampled = finished(tinkercloud, "asample", **model, **sample)["sequences"][0]
    assert len(sampled["tokens"]) == len(sampled["logprobs"])
    assert sampled["finish_reason"] in ("stop", "length")
    assert tinkercloud.ask("sample", **model, **sample)["sequences"][0]["tokens"]
    several = finished(tinkercloud, "sample", base_model="tiny", prompts=[[1, 2], [3]])
    assert len(several["sequences"]) == 2
    sampler = {**session, "base_model": "tiny", "model_path": None}
    assert "sampling_session_id" in finished(
        tinkercloud, "create_sampling_client", sampling_session_seq_id=0, **sampler
    )
    saved = finished(tinkercloud, "save_weights", **model, name="checkpoint-step-100")
    assert saved["tinker_path"] == f"tinker://{model['model_id']}/weights/checkpoint-step-100"
    assert finished(tinkercloud, "save_weights_for_sampler", **model, name="s")["sampling_session_id"]
    assert tinkercloud.ask("weights_info", path=saved["tinker_path"])["lora_rank"] == 4
    assert tinkercloud.post("/api/v1/session_heartbeat", json=session).status_code == 200
    assert tinkercloud.ask("create_sampling_session", sampling_session_seq_id=1, **sampler)
    assert "abc-123" in tinkercloud.get("/api/v1/sessions").json()["sessions"]
    assert tinkercloud.get("/api/v1/sessions/abc-123").json()["training_run_ids"] == [model["model_id"]]
    assert finished(tinkercloud, "abort_gradient_epoch", **model)["success"] is True
    assert finished(tinkercloud, "unload_model", **model)["model_id"] == model["model_id"]


def test_a_session_s_name_is_each_tenant_s_own(tinkercloud: Tinkercloud, rest_server: ServerProcess) -> None:
    asked = {"model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 4}}
    minted = tinkercloud.ask("create_session")["session_id"]
    mine = tinkercloud.done("create_model", session_id="shared-name", **asked)["model_id"]
    assert tinkercloud.done("create_model", session_id="shared-name", **asked)["model_id"] == mine
    with Tinkercloud(rest_server.url, BOB) as bob:
        assert bob.get("/api/v1/sessions/shared-name").status_code == 404
        assert bob.post("/api/v1/create_model", json={"session_id": minted, **asked}).status_code == 404
        theirs = bob.done("create_model", session_id="shared-name", **asked)["model_id"]
        assert bob.get("/api/v1/sessions/shared-name").json()["training_run_ids"] == [theirs]
    assert theirs != mine
    assert tinkercloud.get("/api/v1/sessions/shared-name").json()["training_run_ids"] == [mine]
    tinkercloud.ask("delete_model", model_id=mine)
    again = tinkercloud.post("/api/v1/create_model", json={"session_id": "shared-name", **asked})
    assert (again.status_code, "model_seq_id" in again.json()["detail"]) == (400, True), "its number is used"
    wrong = tinkercloud.post("/api/v1/create_model", json={"session_id": "../up", **asked})
    assert (wrong.status_code, "session_id" in wrong.json()["detail"]) == (400, True)
    sdk = Wire(rest_server.url, ALICE)
    assert sdk.post("create_model", session_id="never", **asked).status_code == 404, "the SDK creates its own"


def test_a_body_is_json_whatever_curl_calls_it(rest_server: ServerProcess) -> None:
    """`curl -d` says that it sends a form."""
    url, key = f"{rest_server.url}/api/v1/create_session", f"X-API-Key: {ALICE}"
    body = json.dumps({"tags": ["rlve"], "user_metadata": {"experiment": "run_001"}})
    for headers in ([], ["-H", "Content-Type: text/plain"], ["-H", "Content-Type:"]):
        line = ["curl", "-sS", "-H", key, *headers, "-d", body, url]
        done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=True)
        assert json.loads(done.stdout)["session_id"], done.stdout
    line = ["curl", "-sS", "-H", key, "-d", "tags=rlve", url]
    refused = json.loads(subprocess.run(line, capture_output=True, timeout=60, check=True).stdout)
    assert (refused["status_code"], "JSON" in refused["detail"]) == (422, True)


def test_the_fraction_of_tokens_that_are_clipped(tinkercloud: Tinkercloud) -> None:
    """It follows the formula, from the answer's log-probs; importance sampling clips nothing."""
    model = tinkercloud.done("create_model", base_model="tiny", lora_config={"rank": 4})["model_id"]
    advantages = np.asarray([0.5, -0.3, 0.8, -0.2, 0.1, 0.0])
    inputs = {"target_tokens": TOKENS[2:], "advantages": advantages.tolist(), "logprobs": [0.0] * 6}
    datum = {"model_input": {"tokens": TOKENS}, "loss_fn_inputs": inputs}
    ask = {"model_id": model, "data": [datum]}
    first = tinkercloud.done("forward", loss_fn="importance_sampling", **ask)["loss_fn_outputs"][0]
    log_ratio = np.asarray([0.05, -0.5, 0.5, 0.5, -0.5, 3.0])
    inputs["logprobs"] = (np.asarray(first["logprobs"]["data"]) - log_ratio).tolist()
    found = {
        loss: tinkercloud.done("forward_backward", loss_fn=loss, **ask)["metrics"]["pg_clipfrac"]
        for loss in ("importance_sampling", "ppo", "ppo_loss", "cispo")
    }
    inputs["sequence_ratio_mask"] = [1.0] * 6
    found["gspo"] = tinkercloud.done("forward_backward", loss_fn="gspo", **ask)["metrics"]["pg_clipfrac"]
    valid, ratio = advantages != 0, np.exp(log_ratio)
    clipped = np.where(advantages > 0, ratio > 1.2, ratio < 0.8)[valid].mean()
    assert found["ppo"] == found["ppo_loss"] == pytest.approx(clipped) == 0.4
    assert (found["importance_sampling"], found["cispo"]) == (0.0, 0.0)
    assert np.exp(log_ratio.mean()) > 1 + 4e-4, "the ratio of the sequence"
    assert found["gspo"] == pytest.approx((advantages[valid] > 0).mean())


def test_a_stop_string_is_beside_the_model_s_own_end(tinkercloud: Tinkercloud) -> None:
    """It is added, as in SGLang, which draws tinkercloud's samples; the SDK's stops replace the end token."""
    lora = {"rank": 8, "seed": 1}
    model = tinkercloud.done("create_model", base_model="tiny", lora_config=lora)["model_id"]
    datum = {
        "model_input": {"tokens": [*TOKENS, EOS_ID]},
        "loss_fn_inputs": {"target_tokens": [EOS_ID], "weights": [1.0]},
    }
    loss = 1.0
    while loss > 0.1:
        loss = tinkercloud.done("forward_backward", model_id=model, data=[datum])["metrics"]["loss:sum"]
        tinkercloud.done("optim_step", model_id=model, adam_params={"learning_rate": 0.02})
    prompt = {"model_id": model, "prompt": {"tokens": TOKENS}}
    for stop in (["never to be read"], "never", [319], None):
        params = {"temperature": 0, "max_tokens": 6, "stop": stop}
        sampled = tinkercloud.ask("sample", sampling_params=params, **prompt)["sequences"][0]
        assert (sampled["tokens"], sampled["finish_reason"]) == ([EOS_ID], "stop"), stop
    headers = {"X-API-Dialect": "tinker"}
    body = prompt | {"sampling_params": {"temperature": 0, "max_tokens": 6, "stop": ["never"]}}
    sdks = tinkercloud.post("/api/v1/sample", json=body, headers=headers).json()["sequences"][0]
    assert sdks["tokens"][0] == EOS_ID
    assert len(sdks["tokens"]) == 6


@pytest.mark.parametrize("dialect", ["tinkercloud", "xorl", "tinker"])
def test_a_deleted_model_is_gone_on_every_route(tinkercloud: Tinkercloud, dialect: str) -> None:
    tinkercloud.headers["X-API-Dialect"] = dialect
    created = tinkercloud.ask("create_model", base_model="tiny", lora_config={"rank": 4})
    model = created["model_id"]
    saved = tinkercloud.ask("save_weights", model_id=model, name="kept")
    assert tinkercloud.ask("delete_model", model_id=model)["status"] == "deleted"
    data = {"data": [{"model_input": {"tokens": [5]}, "loss_fn_inputs": {"target_tokens": [6]}}]}
    sample = {"prompt": {"tokens": [5]}}
    routes: list[tuple[str, dict[str, Any]]] = [
        *(
            (route, {})
            for route in ("get_info", "optim_step", "delete_model", "unload_model", "kill_session")
        ),
        *((route, data) for route in ("forward", "forward_backward")),
        *((route, sample) for route in ("asample", "sample")),
        *((route, {"name": "n"}) for route in ("save_weights", "save_weights_for_sampler")),
        ("save_weights_external", {"name": "n"}),
        ("load_weights", {"path": "kept"}),
        ("abort_gradient_epoch", {}),
        ("session_heartbeat", {}),
    ]
    expected = 410 if dialect == "tinker" else 404
    for route, body in routes:
        answer = tinkercloud.post(f"/api/v1/{route}", json=body | {"model_id": model})
        assert answer.status_code == expected, (route, answer.text)
        assert model in answer.json()["detail"]
    live = {"model_path": f"tinker://{model}/weights/live", **sample}
    assert tinkercloud.post("/api/v1/asample", json=live).status_code == expected
    assert tinkercloud.get("/api/v1/get_tokenizer", params={"model_id": model}).status_code == expected
    assert tinkercloud.poll(saved["request_id"]).json()["tinker_path"].endswith("/kept"), "it was accepted"
    assert tinkercloud.ask("weights_info", tinker_path=f"tinker://{model}/weights/kept")["is_lora"] is True


def test_the_seven_steps_of_its_end_to_end_script(tinkercloud: Tinkercloud) -> None:
    """`tests/test_e2e_nemo_rl.sh`: full weights, the whole sequence as input, all advantages zero."""
    assert tinkercloud.get("/health").json()["status"] == "healthy"
    session = tinkercloud.ask("create_session", tags=["e2e"], sdk_version="e2e")["session_id"]
    model = tinkercloud.done(
        "create_model",
        session_id=session,
        model_seq_id=1,
        base_model="tiny",
        debug_train_only=True,
        parallelism_config={"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "num_gpus": 4},
        max_seq_len=64,
    )["model_id"]
    zeros = {"data": [0.0] * 4}
    datum = {
        "model_input": {"tokens": TOKENS},
        "loss_fn_inputs": {
            "target_tokens": {"data": TOKENS[4:]},
            "logprobs": zeros,
            "advantages": zeros,
            "mask": zeros,
        },
    }
    trained = tinkercloud.done("forward_backward", model_id=model, data=[datum, datum], loss_fn="ppo_loss")
    assert len(trained["loss_fn_outputs"][1]["logprobs"]["data"]) == 4
    stepped = tinkercloud.done("optim_step", model_id=model)
    assert (stepped["success"], stepped["learning_rates"], stepped["step_count"]) == (True, [1e-4], 1)
    saved = tinkercloud.done("save_weights", model_id=model, path="e2e")
    assert saved["path"] == f"tinker://{model}/weights/e2e"
    deleted = tinkercloud.ask("delete_model", model_id=model)
    assert (deleted["status"], deleted["model_id"]) == ("deleted", model)


def test_its_notebook(tinkercloud: Tinkercloud) -> None:
    """`notebooks/tinkercloud_guide.ipynb` and the scripts beside it: no session, polls by body, clean up."""
    assert "tiny" in tinkercloud.get("/api/v1/capabilities").json()["model_names"]
    created = tinkercloud.ask("create_model", base_model="tiny", lora_config={"rank": 0, "alpha": 0})
    polled = tinkercloud.post("/api/v1/retrieve_future", json={"request_id": created["request_id"]})
    while polled.status_code == 408:
        polled = tinkercloud.post("/api/v1/retrieve_future", json={"request_id": created["request_id"]})
    model = polled.json()["model_id"]
    assert model == created["model_id"]
    name = "/data/checkpoints/notebook"
    saved = tinkercloud.done("save_weights", model_id=model, checkpoint_path=name)
    assert saved["path"] == f"tinker://{model}/weights/notebook"
    assert model in tinkercloud.get("/health").json()["model_ids"]
    assert tinkercloud.ask("delete_model", model_id=model)["status"] == "deleted"
    assert model not in tinkercloud.get("/health").json()["model_ids"]
    assert tinkercloud.ask("cleanup_futures", max_age_hours=0)["cleaned_count"] > 0


def test_failures_as_tinkercloud_s_clients_see_them(
    tinkercloud: Tinkercloud, rest_server: ServerProcess
) -> None:
    """400 for a request that failed, 404 for one that never was, and the message under two names."""
    created = tinkercloud.ask("create_model", base_model="tiny", lora_config={"rank": 4})
    tinkercloud.poll(created["request_id"])
    model = created["model_id"]
    twice = [
        tinkercloud.poll(tinkercloud.ask("save_weights", model_id=model, name="a")["request_id"])
        for _ in range(2)
    ]
    assert [answer.status_code for answer in twice] == [200, 400]
    failed = twice[1].json()
    assert failed["status"] == "failed"
    assert "exists" in failed["error"]
    assert failed["error"] == failed["detail"]
    assert tinkercloud.post("/api/v1/retrieve_future/req_none", json={}).status_code == 404
    missing = tinkercloud.post("/api/v1/get_info", json={"model_id": "model-none"})
    assert (missing.status_code, missing.json()["path"]) == (404, "/api/v1/get_info")
    with Tinkercloud(rest_server.url, "tml-nobody") as stranger:
        assert stranger.get("/api/v1/get_server_capabilities").status_code == 401


def test_sampling_and_resuming(tinkercloud: Tinkercloud) -> None:
    """The weights as they are now are sampled by the model's id; `checkpoint_path` begins where they were."""
    session = tinkercloud.ask("create_session")["session_id"]
    asked = {"session_id": session, "base_model": "tiny", "lora_config": {"rank": 8, "seed": 1}}
    model = tinkercloud.done("create_model", model_seq_id=0, **asked)["model_id"]
    datum = {
        "model_input": {"tokens": TOKENS[:5]},
        "loss_fn_inputs": {"target_tokens": {"data": TOKENS[4:5]}, "weights": [1.0]},
    }
    prompt = {
        "prompt": {"tokens": TOKENS[:4]},
        "sampling_params": {"temperature": 0, "max_tokens": 1, "stop": []},
    }
    first = tinkercloud.done("asample", model_id=model, **prompt)["sequences"][0]
    for _ in range(6):
        loss = tinkercloud.done("forward_backward", model_id=model, data=[datum])["metrics"]["loss:sum"]
        tinkercloud.done("optim_step", model_id=model, adam_params={"learning_rate": 0.03})
    trained = tinkercloud.ask("sample", model_id=model, **prompt)["sequences"][0]
    assert trained["tokens"] == TOKENS[4:5]
    assert trained["logprobs"] != first["logprobs"]
    path = tinkercloud.done("save_weights", model_id=model, name="resume")["tinker_path"]
    again = tinkercloud.done("create_model", model_seq_id=1, checkpoint_path=path, **asked)["model_id"]
    continued = [
        tinkercloud.done("forward_backward", model_id=each, data=[datum])["metrics"]["loss:sum"]
        for each in (model, again)
    ]
    assert continued[0] == continued[1] < loss


def test_operations_without_numbers_that_come_at_once_all_run(tinkercloud: Tinkercloud) -> None:
    model = tinkercloud.done("create_model", base_model="tiny", lora_config={"rank": 4})["model_id"]

    def submit(_number: int) -> str:
        return tinkercloud.ask("optim_step", model_id=model)["request_id"]

    with ThreadPoolExecutor(12) as threads:
        requests = list(threads.map(submit, range(12)))
    counts = [tinkercloud.poll(request).json()["step_count"] for request in requests]
    assert sorted(counts) == list(range(1, 13))
