"""xorl's clients: the calls of its SDK over plain HTTP, and the SDK itself, which pip fetches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conformance.server_process import ServerProcess
from rest.clients import ALICE, BOB, Xorl

PROGRAM = Path(__file__).with_name("xorl_program.py")
TOKENS = [5, 6, 7, 8, 9, 10, 11, 12]
DATUM = {
    "model_input": {"input_ids": TOKENS[:-1]},
    "loss_fn_inputs": {
        "weights": {"data": [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0], "dtype": "float32", "shape": [7]},
        "target_tokens": {"data": TOKENS[1:], "dtype": "int64", "shape": [7]},
    },
}
BATCH = {"data": [DATUM], "loss_fn": "cross_entropy"}
ADAM = {"learning_rate": 0.02, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12, "weight_decay": 0.0}
ADAM |= {"grad_clip_norm": 5.0}


def test_the_calls_of_its_sft(xorl: Xorl, rest_server: ServerProcess) -> None:
    """They are recorded from `simple_sft.py`: its own model id, its own numbers, which begin again at a
    resume."""
    model = {"model_id": "sft"}
    created = {"base_model": "tiny", "lora_config": {"rank": 8, "dropout": 0.0}, **model}
    assert xorl.done("create_model", **created)["model_id"] == "sft"
    losses = []
    for seq_id in range(1, 7, 2):
        first = xorl.ask("forward_backward", seq_id=seq_id, forward_backward_input=BATCH, **model)
        second = xorl.ask("optim_step", seq_id=seq_id + 1, adam_params=ADAM, **model)
        trained, stepped = (xorl.poll(each["request_id"]) for each in (first, second))
        losses.append(trained["metrics"]["loss:mean"])
        assert (first["model_id"], stepped["metrics"]["grad_norm"] > 0) == ("sft", True)
    assert losses == sorted(losses, reverse=True)
    assert trained["metrics"]["valid_tokens:sum"] == 4
    (of_datum,) = trained["loss_fn_outputs"]
    by_token = of_datum["elementwise_loss"]["data"]
    assert by_token[:3] == [0.0, 0.0, 0.0]
    assert by_token[3:] == [-each for each in of_datum["logprobs"]["data"][3:]]
    assert of_datum["loss"]["data"] == [pytest.approx(trained["metrics"]["loss:sum"], rel=1e-5)]
    path = xorl.done("save_weights", seq_id=7, path="half", **model)["path"]
    assert path == "xorl://sft/weights/half"
    forward = xorl.done("forward", seq_id=8, forward_input=BATCH, **model)
    described = xorl.ask("weights_info", xorl_path=path)
    assert (described["base_model"], described["lora_rank"]) == ("tiny", 8)
    again = xorl.done("create_model", **created)
    assert again["model_id"] == "sft", "it is there, and opened again"
    assert xorl.done("load_weights", seq_id=1, path=path, optimizer=True, **model)["path"] == path
    resumed = xorl.done("forward", seq_id=2, forward_input=BATCH, **model)
    assert resumed["loss_fn_outputs"] == forward["loss_fn_outputs"]
    without = BATCH | {"loss_fn_params": {"return_per_token": False}}
    plain = xorl.done("forward", seq_id=3, forward_input=without, **model)["loss_fn_outputs"][0]
    assert plain.keys() == {"logprobs"}
    other = xorl.post("/api/v1/create_model", json=created | {"lora_config": {"rank": 4}})
    assert "unload_model" in other.json()["detail"]
    with Xorl(rest_server.url, BOB) as bob:
        assert bob.post("/api/v1/weights_info", json={"xorl_path": path}).status_code == 404
        assert bob.done("create_model", **created)["model_id"] == "sft", "names are each tenant's own"
        assert bob.ask("list_checkpoints", **model)["checkpoints"] == []
    killed = xorl.ask("kill_session", save_checkpoint=True, **model)
    assert killed["checkpoint_path"] == "xorl://sft/weights/session_sft_final"
    gone = xorl.post("/api/v1/forward", json={"forward_input": BATCH, **model})
    assert gone.status_code in (400, 404)
    listed = [each["path"] for each in xorl.ask("list_checkpoints", **model)["checkpoints"]]
    assert listed == ["xorl://sft/weights/session_sft_final", path], "checkpoints stay, newest first"


def test_a_client_resumes_from_the_paths_of_listings(xorl: Xorl) -> None:
    """It does so as xorl's client, which reads the model's name from the path and gives no alpha: into a
    model that is there, and into one that has to be made again."""
    created = {"base_model": "tiny", "lora_config": {"rank": 4, "alpha": 11, "dropout": 0.0}}
    xorl.done("create_model", model_id="listed", **created)
    xorl.done("forward_backward", model_id="listed", seq_id=1, forward_backward_input=BATCH)
    xorl.done("optim_step", model_id="listed", seq_id=2, adam_params=ADAM)
    xorl.done("save_weights", model_id="listed", seq_id=3, path="s")
    sampler = xorl.done("save_weights_for_sampler", model_id="listed", seq_id=4, name="t")
    assert sampler["path"] == sampler["model_path"] == "xorl://listed/sampler_weights/t"
    trained = xorl.done("forward", model_id="listed", seq_id=5, forward_input=BATCH)["loss_fn_outputs"]
    runs = xorl.get("/api/v1/training_runs", params={"limit": 100}).json()["training_runs"]
    (run,) = (each for each in runs if each["training_run_id"] == "listed")
    path = run["last_checkpoint"]["path"]
    assert (path, run["last_sampler_checkpoint"]["path"]) == ("xorl://listed/weights/s", sampler["path"])
    assert xorl.get("/api/v1/training_runs/listed").json() == run
    for url in ("/api/v1/checkpoints", "/api/v1/training_runs/listed/checkpoints"):
        listed = [each["path"] for each in xorl.get(url).json()["checkpoints"]]
        assert {path, sampler["path"]} <= set(listed)
    sdks = xorl.get("/api/v1/checkpoints", headers={"X-API-Dialect": "tinker"}).json()["checkpoints"]
    assert all(each["path"] == each["tinker_path"] for each in sdks)
    for over in (False, True):
        if over:
            xorl.ask("kill_session", model_id="listed", save_checkpoint=False)
        described = xorl.ask("weights_info", xorl_path=path)
        lora = {"rank": described["lora_rank"], "alpha": None, "dropout": 0.0, "target_modules": None}
        again = {"model_id": "listed", "base_model": described["base_model"], "lora_config": lora}
        assert xorl.done("create_model", **again)["model_id"] == "listed"
        xorl.done("load_weights", model_id="listed", seq_id=1, path=path, optimizer=True)
        resumed = xorl.done("forward", model_id="listed", seq_id=2, forward_input=BATCH)
        assert resumed["loss_fn_outputs"] == trained
        assert xorl.ask("get_info", model_id="listed")["lora_alpha"] == 11


def test_a_failure_is_an_answer(xorl: Xorl) -> None:
    xorl.done("create_model", model_id="failing", base_model="tiny", lora_config={"rank": 4})
    batch = BATCH | {"loss_fn": "drgrpo", "loss_fn_params": {"kl_type": "k9"}}
    bad = xorl.ask("forward_backward", model_id="failing", forward_backward_input=batch)
    failed = xorl.poll(bad["request_id"])
    assert failed["category"] == "user"
    assert "'k9'" in failed["error"]
    unloading = xorl.ask("unload_model", model_id="failing", type="unload_model")
    assert xorl.poll(unloading["request_id"])["model_id"] == "failing"


def test_gradients_are_token_means(xorl: Xorl) -> None:
    """The norm of a step's gradient, which the sum over the tokens has for a model that asks for it."""
    norms = {}
    for kind in ("token_mean", "sum"):
        name = f"norm-{kind}"
        asked = {"base_model": "tiny", "lora_config": {"rank": 4, "seed": 3}, "grad_normalization": kind}
        xorl.done("create_model", model_id=name, **asked)
        xorl.done("forward_backward", model_id=name, forward_backward_input=BATCH)
        norms[kind] = xorl.done("optim_step", model_id=name, learning_rate=0.0)["metrics"]["grad_norm"]
    assert norms["sum"] == pytest.approx(4 * norms["token_mean"], rel=1e-5)


def test_aborted_gradients_are_not_stepped_with(xorl: Xorl) -> None:
    norms = []
    for name, aborted in (("aborted", True), ("plain", False)):
        model = {"model_id": name}
        asked = {"base_model": "tiny", "lora_config": {"rank": 4, "seed": 5}, "grad_normalization": "sum"}
        xorl.done("create_model", **asked, **model)
        if aborted:
            xorl.done("forward_backward", forward_backward_input=BATCH, **model)
            xorl.done("abort_gradient_epoch", **model)
        xorl.done("forward_backward", forward_backward_input=BATCH, **model)
        norms.append(xorl.done("optim_step", learning_rate=0.0, **model)["metrics"]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


@pytest.fixture(scope="module")
def sdk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """xorl-client 0.1.0; what it imports is there already."""
    folder = tmp_path_factory.mktemp("xorl-client")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
    subprocess.run([*pip, "xorl-client==0.1.0"], check=True, capture_output=True, timeout=300)
    return folder


def run(server: ServerProcess, sdk: Path, *arguments: str) -> dict[str, Any]:
    environment = {"XORL_BASE_URL": server.url, "XORL_API_KEY": ALICE, "PYTHONPATH": str(sdk)}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_its_sdk_trains_and_resumes(rest_server: ServerProcess, sdk: Path) -> None:
    trained = run(rest_server, sdk, "supervised", "from-sdk")
    first, *_, last = trained["losses"]
    assert last < first / 2, "its client gives no seed: some adapters overshoot on the way down"
    assert trained["saved"] == "xorl://from-sdk/weights/half"
    assert trained["listed"] == ["sampler_weights/from-sdk/s1", "weights/from-sdk/half"]
    assert "no_such_loss" in trained["refused"]
    resumed = run(rest_server, sdk, "resume", trained["saved"])
    assert resumed["losses"] == trained["after"], "as if it had never stopped"
    assert resumed["path"] == "xorl://from-sdk/weights/session_from-sdk_final"


@pytest.mark.slow
def test_its_sdk_learns_from_rewards(rest_server: ServerProcess, sdk: Path) -> None:
    rewards = run(rest_server, sdk, "reinforce", "rl")["rewards"]
    assert sum(rewards[-3:]) > sum(rewards[:3])


def test_a_model_s_checkpoint_is_sampled_by_less_than_its_uri(xorl: Xorl) -> None:
    for name in ("whose", "another"):
        xorl.done("create_model", base_model="tiny", model_id=name, lora_config={"rank": 4})
    path = xorl.done("save_weights_for_sampler", model_id="whose", seq_id=1, name="short")["path"]
    for short in (path, "sampler_weights/short", "short"):
        session = xorl.ask("create_sampling_session", model_id="whose", model_path=short)
        assert session["lora_name"].startswith("short")
    for wrong, status in ((path, 400), ("short", 404)):
        body = {"model_id": "another", "model_path": wrong}
        assert xorl.post("/api/v1/create_sampling_session", json=body).status_code == status
