"""Training in bfloat16, at a real model's width: the kernels of small products are others."""

import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_training import lora, random_data, run, with_random_b
from safetensors.numpy import save_file
from tinsmith.engine.training.trainer import Trainer
from tinsmith.model import decoder
from tinsmith.model.folder import read_config
from tinsmith.model.load import load_base
from tiny_models import write_model

from tests.engine import full_weight_gradients

WIDE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 1,
    "max_position_embeddings": 512,
}


def test_gradients_are_those_of_float32(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("wide"), "llama", tokenizer=False, **WIDE)
    config = read_config(folder)
    data = random_data([300, 150, 40])
    results = []
    for dtype in (jnp.float32, jnp.bfloat16):
        graph, _ = decoder.build(config, dtype)
        trainer = Trainer(graph, load_base(folder, config, dtype), config)
        state = with_random_b(trainer.create(lora(8)), 1)
        output = run(trainer, state, data)
        results.append((np.concatenate(output.logprobs), jax.tree.leaves(state.gradients)))
    (exact, exact_gradients), (logprobs, gradients) = results
    assert np.abs(logprobs - exact).max() < 0.25
    assert np.abs(logprobs - exact).mean() < 0.03
    for gradient, wanted in zip(gradients, exact_gradients, strict=True):
        error = np.linalg.norm(np.asarray(gradient) - wanted) / np.linalg.norm(wanted)
        assert error < 0.1


def torch_gradients(folder, into):
    """Write the model again with gradients as its weights: those of `full_weight_gradients.token_rows`, by
    transformers and torch in float32."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = torch.tensor(full_weight_gradients.token_rows())
    logprobs = torch.log_softmax(model(rows[:, :-1]).logits, -1)
    (-logprobs.gather(-1, rows[:, 1:, None]).sum()).backward()
    into.mkdir()
    shutil.copy(folder / "config.json", into)
    gradients = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    save_file(gradients, into / "model.safetensors")
    return into


@pytest.mark.reference
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_full_weight_gradients_are_torch_s_in_float32(tmp_path, tied):
    """Every second token is the same: its sum over the tokens needs float32. On one device, and on eight."""
    folder = write_model(
        *(tmp_path / "model", "qwen3"),
        tokenizer=False,
        dtype="bfloat16",
        num_hidden_layers=1,
        tie_word_embeddings=tied,
    )
    expected = torch_gradients(folder, tmp_path / "gradients")
    errors = full_weight_gradients.errors(folder, expected)
    assert any("embed_tokens" in name for name in errors)
    assert max(errors.values()) < 0.01, errors
    program = [sys.executable, full_weight_gradients.__file__, folder, expected]
    result = subprocess.run(program, capture_output=True, text=True, timeout=500, check=False)
    assert result.returncode == 0, result.stderr[-3000:]


def test_a_trained_bias_has_a_float32_gradient_and_the_sum_that_bfloat16_has():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, 8192, 3)), jnp.bfloat16)
    bias = jnp.asarray(rng.normal(size=3), jnp.float32)
    cotangent = jnp.asarray(rng.normal(size=x.shape) + 1, jnp.bfloat16)
    for operation in (jnp.add, jnp.multiply):
        y, pull = jax.vjp(lambda b, operation=operation: decoder.by_vector(operation, x, b), bias)
        assert y.dtype == jnp.bfloat16
        np.testing.assert_array_equal(y, operation(x, bias.astype(jnp.bfloat16)))
        weight = np.float64(1) if operation is jnp.add else np.asarray(x, np.float64)
        want = (np.asarray(cotangent, np.float64) * weight).sum((0, 1))
        np.testing.assert_allclose(pull(cotangent)[0], want, rtol=1e-4)
