"""The load of routers, against transformers' routers and the definitions in the SDK."""

import numpy as np
import pytest
from engine_training import datum, lora, make_trainer, run
from tinsmith.engine.training.router_metrics import router_metrics

LENGTHS = [31, 7, 18, 3]


def test_the_definitions_of_the_sdk():
    tokens = np.array([[4, 4, 4, 4], [0, 0, 12, 4]])
    assert router_metrics(tokens) == {
        "e_frac_with_tokens:mean": 0.75,
        "e_frac_oversubscribed:mean": 0.125,
        "e_max_violation:mean": 1.0,
        "e_max_violation:max": 2.0,
        "e_min_violation:mean": -0.5,
    }


def test_a_dense_model_has_none(tmp_path):
    trainer = make_trainer(tmp_path / "model", "llama")
    tokens = np.arange(10)
    output = run(
        trainer,
        trainer.create(lora(4)),
        [datum(tokens[:-1], target_tokens=tokens[1:], weights=np.ones(9, np.float32))],
    )
    assert not [name for name in output.metrics if name.startswith("e_")]


@pytest.mark.reference
def test_an_operation_s_metrics_are_those_of_transformers_choices(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    trainer = make_trainer(tmp_path / "model", "qwen3_moe")
    rng = np.random.default_rng(0)
    data = [rng.integers(0, 320, length + 1) for length in LENGTHS]
    output = run(
        trainer,
        trainer.create(lora(4)),
        [datum(x[:-1], target_tokens=x[1:], weights=np.ones(len(x) - 1, np.float32)) for x in data],
    )

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    counts = np.zeros((3, 8), int)
    choices = []  # [T, layers x chosen] of each sequence
    for tokens in data:
        with torch.no_grad():
            found = model(torch.tensor(tokens[None, :-1]), output_router_logits=True)
        chosen = [torch.topk(logits, 3, dim=-1).indices.numpy() for logits in found.router_logits]
        choices.append(np.concatenate(chosen, -1))
        for layer, of_layer in enumerate(chosen):
            counts[layer] += np.bincount(of_layer.ravel(), minlength=8)
    assert counts.sum() == 3 * 3 * sum(LENGTHS)
    expected = router_metrics(counts)
    assert {name: output.metrics[name] for name in expected} == pytest.approx(expected)

    # Given as inputs, the same choices change nothing, also beside a datum without them.
    inputs = [{"routed_experts": each} for each in choices[:-1]] + [{}]
    replayed = run(
        trainer,
        trainer.create(lora(4)),
        [
            datum(x[:-1], target_tokens=x[1:], weights=np.ones(len(x) - 1, np.float32), **more)
            for x, more in zip(data, inputs, strict=True)
        ],
    )
    for found, free in zip(replayed.logprobs, output.logprobs, strict=True):
        np.testing.assert_allclose(found, free, atol=1e-5)
    assert {name: replayed.metrics[name] for name in expected} == pytest.approx(expected)
