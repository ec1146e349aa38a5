"""Saving, loading and sampling through the unmodified SDK."""

from __future__ import annotations

import numpy as np
import pytest
import tinker
from conformance.batches import batch, logprobs
from conformance.test_sdk_training import step
from tinker import types

PROMPT = types.ModelInput.from_ints([5, 6, 7, 8, 9])
GREEDY = types.SamplingParams(max_tokens=6, temperature=0.0, stop=[])


def forward(client: tinker.TrainingClient, data: list[types.Datum]) -> np.ndarray:
    return np.concatenate(logprobs(client.forward(data, "cross_entropy").result()))


def test_a_loaded_model_goes_on_where_the_saved_one_was(
    service: tinker.ServiceClient, training: tinker.TrainingClient
) -> None:
    data = batch()
    step(training, data)
    path = training.save_state("after-one").result().path
    step(training, data)
    expected = forward(training, data)

    resumed = service.create_training_client_from_state_with_optimizer(path).result()
    step(resumed, data)
    np.testing.assert_allclose(forward(resumed, data), expected, atol=1e-5)

    # Into the model that exists: back to the saved state, with the same next step.
    training.load_state_with_optimizer(path).result()
    step(training, data)
    np.testing.assert_allclose(forward(training, data), expected, atol=1e-5)

    # Without the optimizer's state the next step is another one.
    fresh = service.create_training_client_from_state(path).result()
    step(fresh, data)
    assert np.abs(forward(fresh, data) - expected).max() > 1e-4


def test_a_name_is_taken_once(training: tinker.TrainingClient) -> None:
    training.save_state("same").result()
    with pytest.raises(tinker.RequestFailedError, match="same"):
        training.save_state("same").result()
    training.save_state("other").result()


def test_loading_what_does_not_exist(service: tinker.ServiceClient, training: tinker.TrainingClient) -> None:
    path = f"tinker://{training.model_id}/weights/nothing"
    with pytest.raises(tinker.NotFoundError, match="unknown checkpoint"):
        service.create_training_client_from_state(path).result()


def test_a_sampler_scores_tokens_as_the_trainer_does(
    service: tinker.ServiceClient, training: tinker.TrainingClient
) -> None:
    data = batch(1, seed=3)
    for _ in range(3):
        step(training, data)
    path = training.save_weights_for_sampler("trained").result().path
    tokens = data[0].model_input.to_ints()
    rows = logprobs(training.forward(data, "cross_entropy").result())[0]
    scored = (
        service.create_sampling_client(model_path=path)
        .result()
        .compute_logprobs(data[0].model_input)
        .result()
    )
    assert len(scored) == len(tokens)
    # Position i of the datum predicts target i, which is token i + 1 of the prompt.
    np.testing.assert_allclose(scored[1:], rows[:-1], atol=1e-4)


def test_an_old_sampler_keeps_its_weights(training: tinker.TrainingClient) -> None:
    data = batch(2)
    sampler = training.save_weights_and_get_sampling_client().result()
    before = sampler.compute_logprobs(PROMPT).result()[1:]
    for _ in range(3):
        step(training, data)
    newer = training.save_weights_and_get_sampling_client().result()
    np.testing.assert_allclose(sampler.compute_logprobs(PROMPT).result()[1:], before, atol=1e-6)
    assert np.abs(np.subtract(newer.compute_logprobs(PROMPT).result()[1:], before)).max() > 1e-3


def test_sampling(service: tinker.ServiceClient, training: tinker.TrainingClient) -> None:
    base = service.create_sampling_client(base_model="tiny").result()
    fresh = training.save_weights_and_get_sampling_client().result()
    answers = [client.sample(PROMPT, 2, GREEDY).result() for client in (base, fresh)]
    tokens = [list(sequence.tokens) for answer in answers for sequence in answer.sequences]
    assert len(tokens) == 4
    assert all(row == tokens[0] for row in tokens), "a fresh adapter samples as the base model does"
    assert len(tokens[0]) == 6
    assert all(len(sequence.logprobs) == 6 for answer in answers for sequence in answer.sequences)
    assert answers[0].sequences[0].stop_reason == "length"


def test_a_stop_token_ends_a_sequence_and_is_part_of_it(service: tinker.ServiceClient) -> None:
    base = service.create_sampling_client(base_model="tiny").result()
    tokens = list(base.sample(PROMPT, 1, GREEDY).result().sequences[0].tokens)
    params = types.SamplingParams(max_tokens=6, temperature=0.0, stop=[tokens[2]])
    (sequence,) = base.sample(PROMPT, 1, params).result().sequences
    assert sequence.stop_reason == "stop"
    assert list(sequence.tokens) == tokens[: tokens.index(tokens[2]) + 1]


def test_listings(server, training: tinker.TrainingClient) -> None:
    from conformance.conftest import ALICE, BOB

    training.save_state("listed", ttl_seconds=7200, user_metadata={"a": "b"}).result()
    training.save_weights_for_sampler("listed").result()
    rest = tinker.RestClient(base_url=server.url, api_key=ALICE)
    mine = rest.list_checkpoints(training.model_id).result().checkpoints
    assert {checkpoint.checkpoint_id for checkpoint in mine} == {"weights/listed", "sampler_weights/listed"}
    saved = next(checkpoint for checkpoint in mine if checkpoint.checkpoint_type == "training")
    assert saved.size_bytes > 0
    assert saved.user_metadata == {"a": "b"}
    assert saved.expires_at is not None
    runs = rest.list_training_runs(limit=100).result().training_runs
    assert training.model_id in {run.training_run_id for run in runs}
    info = rest.get_weights_info_by_tinker_path(saved.tinker_path).result()
    assert (info.base_model, info.lora_rank) == ("tiny", 4)
    theirs = tinker.RestClient(base_url=server.url, api_key=BOB)
    of_bob = theirs.list_training_runs(limit=100).result().training_runs
    assert training.model_id not in {run.training_run_id for run in of_bob}
    rest.delete_checkpoint(training.model_id, "weights/listed").result()
    left = rest.list_checkpoints(training.model_id).result().checkpoints
    assert [checkpoint.checkpoint_id for checkpoint in left] == ["sampler_weights/listed"]
