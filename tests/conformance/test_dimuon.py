"""The SDK's dimuon, over a real server: trained, saved, resumed, refused."""

from __future__ import annotations

import numpy as np
import pytest
import tinker
from conformance.batches import batch, logprobs
from conformance.server_process import Wire
from tinker import types

CONFIG, PARAMS = types.DimuonOptimizerConfig(), types.DimuonParams(learning_rate=5e-3)


def test_a_resumed_dimuon_run_equals_the_uninterrupted_one(service: tinker.ServiceClient) -> None:
    training = service.create_lora_training_client(
        base_model="tiny", rank=5, seed=7, optimizer=CONFIG
    ).result()
    assert training.get_info().optimizer_config.model_dump() == CONFIG.model_dump()
    data = batch(3, seed=5)

    def step(client: tinker.TrainingClient) -> np.ndarray:
        before = np.concatenate(logprobs(client.forward_backward(data, "cross_entropy").result()))
        client.optim_step(PARAMS).result()
        return before

    first = step(training)
    step(training)
    saved = training.save_state("halfway").result().path
    uninterrupted = [step(training) for _ in range(3)]
    assert uninterrupted[-1].mean() > first.mean() + 0.05
    again = service.create_training_client_from_state_with_optimizer(saved).result()
    assert again.get_info().optimizer_config.model_dump() == CONFIG.model_dump()
    np.testing.assert_allclose([step(again) for _ in range(3)], uninterrupted, rtol=1e-5)
    weights_alone = service.create_training_client_from_state(saved).result()
    assert weights_alone.get_info().optimizer_config.type == "adamw"
    np.testing.assert_allclose(
        np.concatenate(logprobs(weights_alone.forward_backward(data, "cross_entropy").result())),
        uninterrupted[0],
        rtol=1e-5,
    )
    weights_alone.optim_step(types.AdamParams()).result()
    with pytest.raises(tinker.BadRequestError, match="was trained with dimuon, the model with adamw"):
        weights_alone.load_state_with_optimizer(saved).result()


def test_parameters_of_another_optimizer_are_refused(wire: Wire) -> None:
    session = wire.session()

    def create(number: int, **config):
        return wire.post(
            "create_model",
            session_id=session,
            model_seq_id=number,
            base_model="tiny",
            lora_config={"rank": 4},
            optimizer_config=config,
        )

    def step(model: str, seq_id: int, **body):
        return wire.post("optim_step", model_id=model, seq_id=seq_id, **body)

    assert "adamw, dimuon" in create(0, type="adafactor").json()["error"]
    assert "version 1" in create(0, type="dimuon", version=2).json()["error"]
    dimuon = wire.result(create(0, type="dimuon", version=1))["model_id"]
    refused = {
        "dimuon": {"adam_params": {"learning_rate": 1e-3}},
        "unknown'": {"optimizer_params": {"type": "unknown", "learning_rate": 1e-3}},
        "beta1": {"optimizer_params": {"type": "dimuon", "learning_rate": 1e-3, "beta1": 1}},
        "learning_rate": {"optimizer_params": {"type": "dimuon"}},
        "weight_decay": {"optimizer_params": {"type": "dimuon", "learning_rate": 1e-3, "weight_decay": 1}},
    }
    for seq_id, (reason, body) in enumerate(refused.items(), 1):
        answer = step(dimuon, seq_id, **body)
        assert answer.status_code in (400, 422), reason
        assert reason in answer.json()["error"]
    adamw = wire.model(session, 1)
    params = {"type": "dimuon", "learning_rate": 1e-3}
    assert "optimizer is adamw" in step(adamw, 1, optimizer_params=params).json()["error"]
    assert (
        wire.result(step(dimuon, len(refused) + 1, optimizer_params=params))["metrics"]["optimizer_step"] == 1
    )
