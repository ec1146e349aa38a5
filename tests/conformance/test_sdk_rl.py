"""The RL loop through the unmodified SDK: sample groups, score them, train, sample from the new weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tinker
from conformance.batches import logprobs
from conformance.conftest import ALICE, BOB
from conformance.server_process import ServerProcess
from tinker import types

LOSSES = ["importance_sampling", "ppo", "cispo", "dro", "gspo", "stable_reinforce"]
PROMPTS = [[5, 6, 7, 8, 9], [11, 12, 13]]
GROUP = 8
ADAM = types.AdamParams(learning_rate=2e-2)
STABLE_REINFORCE = {
    "mask_low_threshold": 0.6,
    "mask_high_threshold": 1.8,
    "truncation_threshold": 1.2,
    "kl_coeff": 0.3,
}


def reward(tokens: list[int]) -> float:
    return float(np.mean([token % 2 == 0 for token in tokens]))


def sampler_of(training: tinker.TrainingClient) -> tinker.SamplingClient:
    return training.save_weights_and_get_sampling_client(record_stability_info=True).result()


def rollouts(sampler: tinker.SamplingClient, seed: int, loss: str = "") -> tuple[list[types.Datum], float]:
    """A group of each prompt as datums with provenance, laid out as tinker-cookbook does; the mean reward."""
    params = types.SamplingParams(max_tokens=12, seed=seed, stop=[])
    futures = [
        sampler.sample(types.ModelInput.from_ints(prompt), num_samples=GROUP, sampling_params=params)
        for prompt in PROMPTS
    ]
    data, rewards = [], []
    for prompt, future in zip(PROMPTS, futures, strict=True):
        sequences = future.result().sequences
        scores = [reward(sequence.tokens) for sequence in sequences]
        rewards += scores
        for sequence, score in zip(sequences, scores, strict=True):
            data.append(_datum(prompt, sequence, score - np.mean(scores), loss))
    return data, float(np.mean(rewards))


def _datum(prompt: list[int], sequence: types.SampledSequence, advantage: float, loss: str) -> types.Datum:
    unscored, count = len(prompt) - 1, len(sequence.tokens)
    inputs = {
        "target_tokens": prompt[1:] + sequence.tokens,
        "logprobs": [0.0] * unscored + sequence.logprobs,
        "advantages": [0.0] * unscored + [float(advantage)] * count,
    }
    if loss == "gspo":
        inputs["sequence_ratio_mask"] = [0.0] * unscored + [1.0] * count
    name = sequence.sequence_id
    return types.Datum(
        model_input=types.ModelInput.from_ints(prompt + sequence.tokens[:-1]), loss_fn_inputs=inputs
    ).with_provenance(
        model_input=[
            types.PromptProvenanceSpan(sequence_id=name, length=len(prompt)),
            types.SampledProvenanceSpan(sequence_id=name, length=count - 1),
        ],
        loss_fn_inputs=[
            types.PromptProvenanceSpan(sequence_id=name, offset=1, length=unscored),
            types.SampledProvenanceSpan(sequence_id=name, length=count),
        ],
    )


def column(data: list[types.Datum], name: str) -> np.ndarray:
    return np.concatenate([np.asarray(datum.loss_fn_inputs[name].data, "float64") for datum in data])


def without(data: list[types.Datum], name: str) -> list[types.Datum]:
    return [
        replace(datum, loss_fn_inputs={k: v for k, v in datum.loss_fn_inputs.items() if k != name})
        for datum in data
    ]


def test_the_loop_with_every_loss(training: tinker.TrainingClient) -> None:
    """Samples have the log-probs with which they are trained, for every policy along the way."""
    first = sampler_of(training)
    as_sampled, _ = rollouts(first, seed=1)
    for step, loss in enumerate(LOSSES):
        sampler = sampler_of(training)
        data, _ = rollouts(sampler, seed=step, loss=loss)
        output = training.forward_backward(data, loss)
        update = training.optim_step(ADAM)
        sampled = column(data, "logprobs")
        difference = np.abs(np.concatenate(logprobs(output.result())) - sampled)[sampled != 0]
        assert len(difference) == 12 * GROUP * len(PROMPTS)
        assert difference.max() <= 1e-4, loss
        assert next(value for key, value in update.result().metrics.items() if "grad_norm" in key) > 0

    moved = np.concatenate(logprobs(training.forward(as_sampled, "importance_sampling").result()))
    sampled = column(as_sampled, "logprobs")
    assert np.abs(moved - sampled)[sampled != 0].max() > 1e-2, "six steps change the policy"
    again, _ = rollouts(first, seed=1)
    np.testing.assert_array_equal(column(again, "target_tokens"), column(as_sampled, "target_tokens"))
    np.testing.assert_allclose(column(again, "logprobs"), sampled, atol=1e-5)


def test_the_reward_rises(training: tinker.TrainingClient) -> None:
    rewards = []
    for step in range(10):
        sampler = sampler_of(training)
        data, mean = rollouts(sampler, seed=step)
        rewards.append(mean)
        training.forward_backward(data, "stable_reinforce")
        training.optim_step(types.AdamParams(learning_rate=5e-2)).result()
    assert np.mean(rewards[-2:]) >= rewards[0] + 0.3, rewards


@pytest.fixture
def off_policy(training: tinker.TrainingClient) -> list[types.Datum]:
    """Sampled from weights that the training client has left behind."""
    data, _ = rollouts(sampler_of(training), seed=3)
    training.forward_backward(data, "importance_sampling")
    training.optim_step(ADAM).result()
    return data


def test_stable_reinforce_finds_the_log_probs_by_provenance(
    training: tinker.TrainingClient, off_policy: list[types.Datum]
) -> None:
    given = training.forward(off_policy, "stable_reinforce", STABLE_REINFORCE).result()
    found = training.forward(without(off_policy, "logprobs"), "stable_reinforce", STABLE_REINFORCE).result()
    assert found.metrics["loss:sum"] == given.metrics["loss:sum"]

    learned, advantages = np.concatenate(logprobs(given)), column(off_policy, "advantages")
    difference = learned - column(off_policy, "logprobs")
    ratio = np.exp(difference)
    kept = (ratio >= 0.6) & (ratio <= 1.8) & (advantages != 0)
    terms = -np.minimum(ratio, 1.2) * learned * advantages + 0.3 * (ratio - 1 - difference)
    assert 0 < kept.sum() < (advantages != 0).sum(), "some tokens are outside the band"
    assert given.metrics["loss:sum"] == pytest.approx(terms[kept].sum(), rel=1e-4)


def test_provenance_that_does_not_fit(
    server: ServerProcess, training: tinker.TrainingClient, off_policy: list[types.Datum]
) -> None:
    """Each with a message that names the datum and what is wrong with it."""
    bare = without(off_policy, "logprobs")

    def refused(datum: types.Datum, message: str, client: tinker.TrainingClient = training) -> None:
        with pytest.raises(tinker.APIStatusError, match=message):
            client.forward_backward([datum], "stable_reinforce").result()

    refused(replace(bare[0], model_input_spans=None, loss_fn_input_spans=None), "datum 0.*with_provenance")
    other = replace(bare[0], loss_fn_input_spans=bare[1].loss_fn_input_spans)
    refused(other, r"datum 0: loss_fn_input_spans\[1\].*not the tokens")
    advantages = [1.0] * len(bare[0].loss_fn_inputs["advantages"].data)
    scored = types.Datum(bare[0].model_input, bare[0].loss_fn_inputs | {"advantages": advantages})
    spans = {"model_input_spans": bare[0].model_input_spans}
    refused(
        replace(scored, loss_fn_input_spans=bare[0].loss_fn_input_spans, **spans),
        "'advantages'.*position 0.*not sampled",
    )
    unknown = [
        types.SampledProvenanceSpan(sequence_id="req_none:0", length=len(advantages)),
    ]
    refused(replace(bare[0], loss_fn_input_spans=unknown), "unknown sequence 'req_none:0'")
    bobs = tinker.ServiceClient(base_url=server.url, api_key=BOB)
    stranger = bobs.create_lora_training_client(base_model="tiny", rank=4).result()
    refused(bare[0], "unknown sequence", stranger)
    bobs.close("success").result()
    with pytest.raises(tinker.APIStatusError, match=r"kl_coeff.*'much'.*number"):
        training.forward_backward(off_policy, "stable_reinforce", {"kl_coeff": "much"}).result()
    # None of these has used up a place in the sequence: the next operation runs.
    assert training.forward(off_policy, "stable_reinforce").result().metrics


@pytest.mark.slow
def test_provenance_is_found_after_a_restart(make_server) -> None:
    server = make_server().start()
    service = tinker.ServiceClient(base_url=server.url, api_key=ALICE)
    training = service.create_lora_training_client(base_model="tiny", rank=4, seed=7).result()
    data, _ = rollouts(sampler_of(training), seed=3)
    before = training.forward(data, "stable_reinforce").result().metrics["loss:sum"]
    assert server.stop() == 0
    server.start()
    after = training.forward(without(data, "logprobs"), "stable_reinforce").result().metrics["loss:sum"]
    assert after == pytest.approx(before, rel=1e-5)
