"""Long rows, and sampler beside trainer, in bfloat16 on this machine's devices.

On a CPU the rows are short and the model is tiny; `make gpu` takes rows of 32k and 128k tokens.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_sampling import request, run_all, sequences
from engine_training import datum, lora, run, with_random_b, worst
from tinsmith.engine.sampling.sampler import Sampler
from tinsmith.engine.training.trainer import Trainer
from tinsmith.model import decoder
from tinsmith.model.folder import stated_config
from tiny_models import hf_config

ON_CPU = jax.default_backend() == "cpu"
LENGTHS = [512] if ON_CPU else [32_768, 131_072]
SIZES = {"num_hidden_layers": 2, "head_dim": 64, "max_position_embeddings": 131_072}
if not ON_CPU:
    SIZES |= {
        "num_hidden_layers": 4,
        "head_dim": 128,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "vocab_size": 32_768,
    }
MEAN, LARGEST = 0.02, 0.2
"""The bounds of the differences between the sampler's log-probs and the trainer's, in nats."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(hf_config("qwen3", **SIZES)))
    config = stated_config(folder)
    graph, _ = decoder.build(config, jnp.bfloat16)
    return config, graph, decoder.random_base(config, jnp.bfloat16)


def trainer_of(model, length: int) -> Trainer:
    config, graph, base = model
    return Trainer(graph, base, config, max_sequence_length=length)


def of_tokens(tokens, weighted=None):
    weights = np.ones(len(tokens) - 1, np.float32)
    weights[len(tokens) - 1 if weighted is None else weighted :] = 0
    return datum(tokens[:-1], target_tokens=tokens[1:], weights=weights)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_long_row_is_causal_and_packed_datums_do_not_see_each_other(model, length, record_property):
    """The first tokens of a long row have the log-probs and the gradients of a short datum of their own, and
    so has a datum that follows another one in its row."""
    rng, short = np.random.default_rng(0), 129
    trainer = trainer_of(model, length)
    tokens = rng.integers(3, model[0].vocab_size, length + 1)
    state = with_random_b(trainer.create(lora(rank=8)))

    def gradients(data):
        found = run(trainer, state, data)
        kept, state.gradients = state.gradients, None
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(kept)))
        return found.logprobs, kept

    (alone,), of_short = gradients([of_tokens(tokens[:short])])
    (whole,), of_long = gradients([of_tokens(tokens, weighted=short - 1)])
    half = length // 2
    (_, second), _ = gradients([of_tokens(tokens[: half + 1]), of_tokens(tokens[:half])])
    differences = [np.abs(np.asarray(x)[: short - 1] - alone).max() for x in (whole, second)]
    record_property("largest difference of log-probs", f"{max(differences):.1e}")
    record_property("difference of gradients", f"{worst(of_long, of_short):.1e}")
    assert np.isfinite(whole).all()
    assert max(differences) < LARGEST
    assert worst(of_long, of_short) < 0.05


def test_the_sampler_s_log_probs_are_the_trainer_s(model, record_property):
    config, graph, base = model
    sampled, prompt = (48, 40) if ON_CPU else (512, 500)
    trainer = trainer_of(model, 2048)
    state = with_random_b(trainer.create(lora(rank=8)))
    sampler = Sampler(
        graph, base, config, kv_cache_tokens=8 * 1152, max_sequence_length=2048, mesh=trainer.mesh
    )
    sampler.register("trained", state.weights, scale=state.scale)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, config.vocab_size, prompt + at) for at in range(4)]
    for at, tokens in enumerate(prompts):
        asked = request(at, tokens, logprobs=True, max_tokens=sampled, seed=at, stop_tokens=[])
        sampler.add(asked, "trained")
    answers = run_all(sampler)
    differences = []
    for at, tokens in enumerate(prompts):
        (answer,) = sequences(answers[str(at)])
        assert len(answer.tokens) == sampled
        whole = np.array([*tokens, *answer.tokens])
        (learned,) = run(trainer, state, [of_tokens(whole)], forward_only=True).logprobs
        differences.append(np.abs(answer.logprobs - np.asarray(learned)[-sampled:]))
    record_property("mean difference", f"{np.mean(differences):.1e}")
    record_property("largest difference", f"{np.max(differences):.1e}")
    assert np.mean(differences) < MEAN
    assert np.max(differences) < LARGEST
