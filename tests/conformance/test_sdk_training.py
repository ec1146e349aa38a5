"""Training through the unmodified SDK."""

from __future__ import annotations

import numpy as np
import pytest
import tinker
from conformance.batches import batch, logprobs, targets
from tinker import types


def step(training: tinker.TrainingClient, data: list[types.Datum], rate: float = 1e-2) -> float:
    """The loss before an Adam step on `data`; both submitted before either is awaited."""
    forward_backward = training.forward_backward(data, "cross_entropy")
    optim_step = training.optim_step(types.AdamParams(learning_rate=rate))
    loss = forward_backward.result().metrics["loss:sum"]
    assert "grad_norm" in " ".join(optim_step.result().metrics or {})
    return loss


def set_flags(training: tinker.TrainingClient, **flags) -> None:
    """Set these flags, as if the server had sent them in the client's configuration."""
    training.holder._client_config = training.holder._client_config.model_copy(update=flags)


def test_the_loss_falls(training: tinker.TrainingClient) -> None:
    data = batch()
    losses = [step(training, data) for _ in range(6)]
    assert losses[-1] < 0.9 * losses[0]


def test_outputs_are_per_datum_and_metrics_have_one_colon(training: tinker.TrainingClient) -> None:
    data = batch(5)
    output = training.forward(data, "cross_entropy").result()
    assert [len(row) for row in logprobs(output)] == targets(data)
    assert all(key.count(":") == 1 for key in output.metrics)
    weights = [np.asarray(datum.loss_fn_inputs["weights"].data) for datum in data]
    expected = -sum(float(row @ weight) for row, weight in zip(logprobs(output), weights, strict=True))
    assert output.metrics["loss:sum"] == pytest.approx(expected, rel=1e-5)


def test_chunks_that_arrive_out_of_order_are_one_batch(
    service: tinker.ServiceClient, training: tinker.TrainingClient
) -> None:
    """The SDK posts the first chunk last and waits for the answers to the others before."""
    data = batch(7)
    chunked = service.create_lora_training_client(base_model="tiny", rank=4, seed=7).result()
    set_flags(chunked, fwdbwd_max_chunk_len=2)
    for _ in range(2):
        split, whole = (client.forward_backward(data, "cross_entropy") for client in (chunked, training))
        steps = [client.optim_step(types.AdamParams(learning_rate=1e-2)) for client in (chunked, training)]
        for one, other in zip(logprobs(split.result()), logprobs(whole.result()), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)
        losses = [future.result().metrics["loss:sum"] for future in (split, whole)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        for done in steps:
            done.result()


def test_a_custom_loss_trains_as_the_built_in_one(
    service: tinker.ServiceClient, training: tinker.TrainingClient
) -> None:
    pytest.importorskip("torch")
    data = batch(3)
    custom = service.create_lora_training_client(base_model="tiny", rank=4, seed=7).result()

    def nll(datums, rows):
        import torch

        weights = [torch.tensor(datum.loss_fn_inputs["weights"].data) for datum in datums]
        return -sum((row * weight).sum() for row, weight in zip(rows, weights, strict=True)), {"calls": 1.0}

    output = custom.forward_backward_custom(data, nll).result()
    custom.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    assert output.metrics["loss:sum"] == pytest.approx(step(training, data), rel=1e-4)
    after = [logprobs(client.forward(data, "cross_entropy").result()) for client in (custom, training)]
    for one, other in zip(*after, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_policy_gradient_losses_run(training: tinker.TrainingClient) -> None:
    data = batch(3)
    sampled = logprobs(training.forward(data, "cross_entropy").result())
    rl = [
        types.Datum(
            model_input=datum.model_input,
            loss_fn_inputs={
                "target_tokens": datum.loss_fn_inputs["target_tokens"],
                "logprobs": row.tolist(),
                "advantages": [1.0] * len(row),
            },
        )
        for datum, row in zip(data, sampled, strict=True)
    ]
    output = training.forward_backward(rl, "importance_sampling").result()
    # The ratio is 1 everywhere: the loss is minus the number of tokens.
    assert output.metrics["loss:sum"] == pytest.approx(-sum(targets(data)), rel=1e-4)


def test_get_info_and_tokenizer(training: tinker.TrainingClient) -> None:
    info = training.get_info()
    assert (info.is_lora, info.lora_rank, info.model_data.model_name) == (True, 4, "tiny")
    assert training.get_tokenizer().encode("hello")


def test_an_operation_that_fails_says_why_and_harms_nothing(training: tinker.TrainingClient) -> None:
    data = batch(2)
    before = training.forward(data, "cross_entropy").result().metrics["loss:sum"]
    with pytest.raises(tinker.RequestFailedError, match="no_such_loss"):
        training.forward_backward(data, "no_such_loss").result()
    assert training.forward(data, "cross_entropy").result().metrics["loss:sum"] == pytest.approx(
        before, rel=1e-5
    )


def test_zstd_bodies(training: tinker.TrainingClient) -> None:
    data = batch(2)
    plain = training.forward(data, "cross_entropy").result().metrics["loss:sum"]
    set_flags(training, proto_compress_fwdbwd=True)
    compressed = training.forward(data, "cross_entropy").result().metrics["loss:sum"]
    assert compressed == pytest.approx(plain, rel=1e-6)
