"""The sequences of tinkercloud's own clients, call by call."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from conformance.server_process import ServerProcess
from rest.clients import Tinkercloud

TOKENS = [5, 6, 7, 8, 9, 10, 11, 12]


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


def test_what_it_sees_of_failures(tinkercloud: Tinkercloud, rest_server: ServerProcess) -> None:
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
