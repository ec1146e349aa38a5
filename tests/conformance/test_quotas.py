"""Quotas: a tenant's unmodified SDK waits where that helps, and other tenants notice nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx
import numpy as np
import openai
import pytest
import tinker
from conformance.batches import batch
from conformance.server_process import ServerProcess, Wire
from conformance.test_sdk_training import set_flags, step
from tinsmith.server.cli import app
from typer.testing import CliRunner

TENANTS = ("busy", "queued", "stored", "full", "many", "described", "calm")


def quota(server: ServerProcess, tenant: str, *options: str) -> str:
    done = CliRunner().invoke(app, ["keys", "quota", tenant, *options, "--data-dir", str(server.data_dir)])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def server(make_server) -> Iterator[ServerProcess]:
    keys = [option for name in TENANTS for option in ("--api-key", f"{name}=tml-{name}")]
    made = make_server(*keys, TINSMITH_LONG_POLL_SECONDS="1", TINSMITH_REFUSED_SAVE_SECONDS="8")
    made_ledger = CliRunner().invoke(app, ["keys", "create", "calm", "--data-dir", str(made.data_dir)])
    assert made_ledger.exit_code == 0, made_ledger.output
    quota(made, "busy", "--requests-per-second", "10")
    quota(made, "queued", "--queued-operations", "3")
    quota(made, "stored", "--checkpoint-bytes", "1")
    quota(made, "full", "--checkpoint-bytes", "0")
    quota(made, "many", "--models", "1")
    quota(made, "described", "--metadata-bytes", "6kB")
    made.start()
    yield made
    assert made.stop() == 0


def sdk(server: ServerProcess, tenant: str) -> tinker.TrainingClient:
    service = tinker.ServiceClient(base_url=server.url, api_key=f"tml-{tenant}")
    return service.create_lora_training_client(base_model="tiny", rank=4, seed=7).result()


@pytest.fixture(scope="module")
def calm(server: ServerProcess) -> tinker.TrainingClient:
    """A client of a tenant that is within its quota."""
    return sdk(server, "calm")


def test_openai_s_client_waits_when_there_are_too_many_requests(server: ServerProcess) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="tml-busy", max_retries=0) as client:

        def ask_often() -> None:
            for _ in range(1000):
                client.models.list()

        with pytest.raises(openai.RateLimitError, match="10 requests a second") as raised:
            ask_often()
        assert (raised.value.type, raised.value.code) == ("requests", "rate_limit_exceeded")
        assert float(raised.value.response.headers["retry-after"]) > 0
        assert client.with_options(max_retries=2).models.list().data


def refusal(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    if status in (429, 507):
        assert float(answer.headers["retry-after"]) > 0
    return answer.json()["error"]


def waits(answer: httpx.Response) -> str:
    """The reason that a poll gives for a tenant that has to wait."""
    assert answer.status_code == 408, answer.text
    assert answer.json()["queue_state"] == "paused_rate_limit"
    return answer.json()["queue_state_reason"]


def test_a_key_that_asks_too_often_waits_and_carries_on(server, calm: tinker.TrainingClient) -> None:
    training = sdk(server, "busy")
    expected = step(training, batch())
    busy = Wire(server.url, "tml-busy")
    while (answer := busy.http.get("/api/v1/sessions")).status_code == 200:
        pass
    assert "10 requests a second" in refusal(answer, 429)
    assert np.isfinite(step(calm, batch()))
    assert "tenant busy is told to wait" in server.log
    assert "tenant calm" not in server.log
    while busy.http.get("/api/v1/sessions").status_code == 200:
        pass  # what it may ask came back meanwhile
    started_at = time.monotonic()
    assert step(training, batch()) < expected
    assert time.monotonic() - started_at > 0.2, "it was not told to wait"


def test_a_full_queue_waits_and_all_of_it_is_served(server, calm: tinker.TrainingClient) -> None:
    training = sdk(server, "queued")
    step(training, batch())
    set_flags(training, fwdbwd_max_chunk_len=2)
    queued = Wire(server.url, "tml-queued")
    other = queued.model()
    server.engine.suspend()
    try:
        losses = [training.forward_backward(batch(6), "cross_entropy") for _ in range(3)]
        deadline = time.monotonic() + 30
        while "tenant queued is told to wait" not in server.log and time.monotonic() < deadline:
            time.sleep(0.05)
        first, second = (queued.forward_backward(other, number) for number in (1, 2))
        assert "operations of this key's tenant are queued" in refusal(queued.optim_step(other, 3), 429)
        assert "queued" in waits(queued.poll(first.json()["request_id"]))
        of_calm = calm.forward(batch(), "cross_entropy")
    finally:
        server.engine.resume()
    values = [future.result().metrics["loss:sum"] for future in losses]
    assert values == pytest.approx([values[0]] * 3)
    assert np.isfinite(of_calm.result().metrics["loss:sum"])
    assert "error" not in queued.result(second)
    assert "error" not in queued.result(queued.optim_step(other, 3)), "its number was not used up"


def test_bytes_of_checkpoints_are_answered_507_until_some_are_deleted(
    server, calm: tinker.TrainingClient
) -> None:
    training = sdk(server, "stored")
    first = training.save_state("first").result().path
    stored = Wire(server.url, "tml-stored")
    refused = stored.post("save_weights", model_id=training.model_id, seq_id=2, path="second")
    assert "delete some" in refusal(refused, 507)
    refused = stored.post("save_weights_for_sampler", model_id=training.model_id, seq_id=2, path="second")
    assert "its quota is 1" in refusal(refused, 507)
    second = training.save_state("second")
    after = training.forward(batch(), "cross_entropy")
    assert calm.save_state("mine").result().path
    with pytest.raises(TimeoutError):
        second.result(timeout=1)
    rest = tinker.RestClient(base_url=server.url, api_key="tml-stored")
    rest.delete_checkpoint_from_tinker_path(first).result()
    assert second.result(timeout=60).path.endswith("/second")
    assert np.isfinite(after.result().metrics["loss:sum"])


def test_a_save_without_room_that_is_not_sent_again_holds_up_nothing(server) -> None:
    full = Wire(server.url, "tml-full")
    model = full.model()
    save = {"model_id": model, "seq_id": 1, "path": "given-up"}
    refusal(full.post("save_weights", **save), 507)
    behind = full.forward_backward(model, 2)
    assert full.poll(behind.json()["request_id"]).status_code == 408
    assert "metrics" in full.result(behind, seconds=30)
    assert "quota" in refusal(full.post("save_weights", **save), 400)


def test_samplers_beyond_the_quota_of_metadata_are_refused_and_hold_up_nothing(server) -> None:
    described = Wire(server.url, "tml-described")
    model = described.model()
    for number in range(1, 13):
        saved = described.post(
            "save_weights_for_sampler", model_id=model, seq_id=number, sampling_session_seq_id=number
        )
        if saved.status_code != 200:
            break
        assert described.result(saved)["sampling_session_id"].endswith(f":{number}")
    assert number > 2
    assert "its quota is 6000" in refusal(saved, 403)
    assert "metrics" in described.result(described.forward_backward(model, number + 1))
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [5, 6]}]}
    of_now = described.post("asample", model_id=model, prompt=prompt, sampling_params={"max_tokens": 1})
    assert "its quota is 6000" in refusal(of_now, 403)


def test_models_beyond_the_quota_are_refused_until_one_is_finished(
    server, calm: tinker.TrainingClient
) -> None:
    service = tinker.ServiceClient(base_url=server.url, api_key="tml-many")
    training = service.create_lora_training_client(base_model="tiny", rank=4, seed=7).result()
    path = training.save_state("kept").result().path
    with pytest.raises(tinker.PermissionDeniedError, match=training.model_id):
        service.create_lora_training_client(base_model="tiny", rank=4).result()
    with pytest.raises(tinker.PermissionDeniedError, match="end the session"):
        service.create_training_client_from_state(path).result()
    session = training.model_id.partition(":")[0]
    many = Wire(server.url, "tml-many")
    first = {"session_id": session, "model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 4}}
    again = many.post("create_model", **first)
    assert again.status_code == 200, "it is the first one, submitted again"
    assert Wire(server.url, "tml-calm").model()
    service.close("success").result()
    deadline = time.monotonic() + 10
    other = many.session()
    create = {"session_id": other, "model_seq_id": 0, "path": path, "optimizer": True}
    while (answer := many.post("load_weights", **create)).status_code == 403:
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.05)
    assert many.result(answer)["model_id"] == f"{other}:train:0"


def test_a_running_server_learns_of_a_quota(server) -> None:
    assert "settings" in quota(server, "calm")
    assert "models  1" in quota(server, "calm", "--models", "1")
    assert "waiting_samples  7" in quota(server, "calm", "--waiting-samples", "7")
    assert "models  1" in quota(server, "calm")
    calm = Wire(server.url, "tml-calm")
    session, deadline = calm.session(), time.monotonic() + 2
    numbers = iter(range(1000))

    def create() -> httpx.Response:
        config = {"rank": 4, "seed": 1}
        number = next(numbers)
        return calm.post(
            "create_model", session_id=session, model_seq_id=number, base_model="tiny", lora_config=config
        )

    while (answer := create()).status_code == 200:
        assert time.monotonic() < deadline
        calm.result(answer)
        time.sleep(0.2)
    refusal(answer, 403)
    assert "settings" in quota(server, "calm", "--reset")
    refused = CliRunner().invoke(app, ["keys", "quota", "a/b"])
    assert refused.exit_code == 2
