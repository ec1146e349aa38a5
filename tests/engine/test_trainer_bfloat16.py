"""Training in bfloat16, at a real model's width: the kernels of small products are others."""

import jax
import jax.numpy as jnp
import numpy as np
from engine_training import datum, lora, random_data, relative, run, with_random_b
from tinsmith.engine.training.trainer import Trainer
from tinsmith.model import decoder
from tinsmith.model.folder import read_config
from tinsmith.model.load import load_base
from tiny_models import write_model

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


def test_sums_over_many_tokens_are_float32_in_full_weight_training(tmp_path):
    """One token stands at every second place. The reference has the same weights, and computes in float32."""
    folder = write_model(tmp_path / "model", "qwen3", tokenizer=False, num_hidden_layers=1)
    config = read_config(folder)
    tokens = np.random.default_rng(0).integers(3, 300, 2049)
    tokens[::2] = 7
    data = [
        datum(
            tokens[at : at + 256], target_tokens=tokens[at + 1 : at + 257], weights=np.ones(256, np.float32)
        )
        for at in range(0, 2048, 256)
    ]
    gradients = []
    for dtype in (jnp.float32, jnp.bfloat16):
        graph, _ = decoder.build(config, dtype)
        trainer = Trainer(graph, load_base(folder, config, dtype), config, micro_batch_tokens=2048)
        state = trainer.create(None)
        state.weights = jax.tree.map(
            lambda w: jax.device_put(w.astype(jnp.bfloat16).astype(jnp.float32), w.sharding), state.weights
        )
        run(trainer, state, data)
        gradients.append(jax.tree_util.tree_leaves_with_path(state.gradients))
    for (path, exact), (_, found) in zip(*gradients, strict=True):
        assert relative(found, exact) < 0.01, jax.tree_util.keystr(path)


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
