"""One client's work changes nothing of another's, and sampling changes nothing of training."""

from __future__ import annotations

import numpy as np
import tinker
from conformance.batches import batch
from conformance.test_sdk_checkpoints import PROMPT, forward
from conformance.test_sdk_training import step
from tinker import types


def test_sampling_from_an_older_checkpoint_leaves_training_where_it_was(
    service: tinker.ServiceClient, training: tinker.TrainingClient
) -> None:
    data = batch()
    step(training, data)
    older = training.save_weights_for_sampler("older").result().path
    for _ in range(2):
        step(training, data)
    before = forward(training, data)
    sampler = service.create_sampling_client(model_path=older).result()
    sampler.sample(PROMPT, 2, types.SamplingParams(max_tokens=8, seed=1)).result()
    np.testing.assert_array_equal(forward(training, data), before)


def test_weight_decay_decays_only_the_model_that_asked_for_it(service: tinker.ServiceClient) -> None:
    data = batch()
    mine, theirs = (
        service.create_lora_training_client(base_model="tiny", rank=4, seed=seed).result() for seed in (1, 2)
    )
    step(mine, data)
    before = forward(mine, data)
    for _ in range(3):
        theirs.forward_backward(data, "cross_entropy").result()
        theirs.optim_step(types.AdamParams(learning_rate=0.1, weight_decay=0.5)).result()
    np.testing.assert_array_equal(forward(mine, data), before)


def test_checkpoints_of_one_name_are_each_models_own(service: tinker.ServiceClient) -> None:
    data = batch()
    clients = [
        service.create_lora_training_client(base_model="tiny", rank=4, seed=seed).result() for seed in (1, 2)
    ]
    for client in clients:
        step(client, data)
    paths = [client.save_state("same").result().path for client in clients]
    for client, path in zip(clients, paths, strict=True):
        loaded = service.create_training_client_from_state(path).result()
        np.testing.assert_array_equal(forward(loaded, data), forward(client, data))
    assert np.abs(forward(clients[0], data) - forward(clients[1], data)).max() > 1e-4
