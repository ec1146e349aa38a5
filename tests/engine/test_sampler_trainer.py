"""What the sampler says that a token's log-prob is, the trainer says too: every family, after training."""

import numpy as np
import pytest
from engine_sampling import load_tiny, make_sampler, random_adapter, request, sample, sequences
from engine_training import datum, lora, operation, random_data, run, with_random_b
from tinsmith.engine.messages import AdamParams
from tinsmith.engine.training.trainer import Trainer

# So long that all decode steps see one bucket of context lengths.
PROMPT = np.random.default_rng(1).integers(3, 320, 260)
SAMPLED = 512


def trained(trainer, spec):
    """A model after three steps that moved it well away from where it began."""
    state = trainer.create(spec)
    if spec is not None:
        with_random_b(state)
    for step in range(3):
        run(trainer, state, random_data([40, 25, 50], seed=step))
        trainer.optim_step(state, AdamParams(learning_rate=5e-3))
    return state


def datum_of(tokens):
    return datum(tokens[:-1], target_tokens=tokens[1:], weights=np.ones(len(tokens) - 1, np.float32))


def forward(trainer, *jobs):
    """Log-probs of the first datum of each (state, data), all in one device batch."""
    results = trainer.forward_backward(
        [trainer.job(state, operation(data, forward_only=True)) for state, data in jobs]
    )
    return [result.logprobs[0] for result in results]


def sample_in_a_crowd(sampler, asked, key):
    """The request's answer when it shares its decode steps with other weights and penalties."""
    sampler.add(asked, key)
    fields = {"max_tokens": 540, "stop_tokens": [], "presence_penalty": 1.0, "top_p": 0.9, "seed": 2}
    sampler.add(request("other", PROMPT[1:], 3, **fields), "other")
    while sampler.has_work:
        for answer in sampler.step():
            if answer.request_id == asked.request_id:
                assert sampler.cancel("other"), "it was there all the time"
                return answer.output
    raise AssertionError("not answered")


@pytest.mark.parametrize(
    ("variant", "spec"),
    [
        ("llama", lora()),
        pytest.param("qwen2", lora(), marks=pytest.mark.slow),
        ("qwen3", lora()),
        pytest.param("mistral", lora(), marks=pytest.mark.slow),
        pytest.param("phi3", lora(), marks=pytest.mark.slow),
        pytest.param("gemma3_text", lora(), marks=pytest.mark.slow),
        ("qwen3_moe", lora()),
        ("gpt_oss", lora()),
        ("deepseek_v3", lora()),
        pytest.param("qwen3_5", lora(), marks=pytest.mark.slow),
        ("qwen3_5_moe", lora()),
        ("llama", None),
    ],
    ids=[
        "llama",
        "qwen2",
        "qwen3",
        "mistral",
        "phi3",
        "gemma3_text",
        "qwen3_moe",
        "gpt_oss",
        "deepseek_v3",
        "qwen3_5",
        "qwen3_5_moe",
        "full weights",
    ],
)
def test_512_sampled_tokens_after_three_steps(tmp_path, variant, spec):
    model = load_tiny(tmp_path, variant, max_position_embeddings=1024)
    trainer = Trainer(model.graph, model.base, model.config, max_sequence_length=832, chunk_tokens=64)
    state = trained(trainer, spec)
    sampler = make_sampler(model, kv_cache_tokens=3328, prefill_tokens=512)
    if spec is None:
        sampler.register("trained", base=state.weights)
    else:
        sampler.register("trained", state.weights, scale=state.scale)
    sampler.register("other", random_adapter(model.config, 2), scale=2.0)

    asked = request("asked", PROMPT, logprobs=True, max_tokens=SAMPLED, seed=3, stop_tokens=[])
    alone = sample(sampler, asked, "trained")
    crowded = sample_in_a_crowd(sampler, asked, "trained")

    (sampled,) = sequences(alone)
    tokens = np.array([*PROMPT, *sampled.tokens])
    assert len(sampled.tokens) == SAMPLED
    (by_itself,) = forward(trainer, (state, [datum_of(tokens)]))
    short = [datum_of(PROMPT[:n]) for n in (20, 9)]
    (packed,) = forward(trainer, (state, [datum_of(tokens), *short]))
    learned = {"alone": by_itself, "packed": packed}
    if spec is not None:
        other = with_random_b(trainer.create(spec), seed=9)
        learned["with another model"], _ = forward(
            trainer, (state, [datum_of(tokens), *short]), (other, short)
        )
    for how, logprobs in learned.items():
        for output in (alone, crowded):
            (said,) = sequences(output)
            assert said.tokens == sampled.tokens
            np.testing.assert_allclose(said.logprobs, logprobs[-SAMPLED:], atol=1e-4, err_msg=how)
            of_prompt = np.frombuffer(output.prompt_logprobs, np.float32)[1:]
            np.testing.assert_allclose(of_prompt, logprobs[: len(PROMPT) - 1], atol=1e-4, err_msg=how)
    (untrained,) = forward(trainer, (trainer.create(spec), [datum_of(tokens)]))
    assert np.abs(untrained - by_itself).max() > 0.5, "three steps have moved the weights"
