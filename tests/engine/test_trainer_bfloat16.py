"""Training in bfloat16, at a real model's width: the kernels of small products are others."""

import jax
import jax.numpy as jnp
import numpy as np
from engine_training import lora, random_data, run, with_random_b
from tinsmith.engine.training.trainer import Trainer
from tinsmith.model import decoder
from tinsmith.model.config import read_config
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
