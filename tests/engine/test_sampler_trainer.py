"""For every family, the sampler's log-probs are the trainer's."""

import numpy as np
import pytest
from engine_sampling import (
    alone_and_together,
    full_forward_logprobs,
    load_tiny,
    make_sampler,
    random_adapter,
    request,
    sample,
    sequences,
)
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
        pytest.param("gpt_oss", lora(), marks=pytest.mark.slow),
        pytest.param("deepseek_v3", lora(), marks=pytest.mark.slow),
        pytest.param("qwen3_5", lora(), marks=pytest.mark.slow),
        pytest.param("qwen3_5_moe", lora(), marks=pytest.mark.slow),
        pytest.param("nemotron_h", lora(), marks=pytest.mark.slow),
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
        "nemotron_h",
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


@pytest.mark.parametrize(
    "variant",
    [
        "deepseek_v3",
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in ("mistral", "phi3", "gemma3_text", "qwen3_moe", "gpt_oss", "qwen3_5", "qwen3_5_moe")
        ),
    ],
)
def test_prefixes_preemption_and_company_change_no_log_prob(tmp_path, variant):
    """Each log-prob is that of one pass of the trainer's trunk over the whole sequence."""
    model = load_tiny(tmp_path, variant)
    adapters = {None: None, "a": random_adapter(model.config, 1)}
    sampler = make_sampler(model, kv_cache_tokens=256)
    sampler.register("a", adapters["a"], scale=2.0)
    rng = np.random.default_rng(2)

    def check(prompt, sampled, key):
        reference = full_forward_logprobs(model, [*prompt, *sampled.tokens], 1.0, adapters[key], 2.0)
        rows = len(prompt) - 1 + np.arange(len(sampled.tokens))
        np.testing.assert_allclose(sampled.logprobs, reference[rows, sampled.tokens], atol=1e-4)

    for key in adapters:
        prompt = rng.integers(3, 320, 75)
        (drawn,) = sequences(sample(sampler, request("first", prompt, max_tokens=21, stop_tokens=[]), key))
        longer = [*prompt, *drawn.tokens, *rng.integers(3, 320, 30)]
        answer = sample(sampler, request("longer", longer, max_tokens=21, stop_tokens=[]), key)
        assert answer.prompt_cache_hit_tokens >= 64, "at least the prompt's whole pages"
        check(prompt, drawn, key)
        check(longer, sequences(answer)[0], key)

    prompts = [rng.integers(3, 320, n) for n in (60, 21, 90, 33, 5)]
    asked = [
        request(i, prompt, 1 + i % 2, max_tokens=most, stop_tokens=[], seed=i)
        for i, (prompt, most) in enumerate(zip(prompts, (30, 90, 20, 60, 40), strict=True))
    ]
    keys = [None, "a", None, None, "a"]
    alone, together, lost = alone_and_together(sampler, asked, keys)
    assert lost, "seven sequences need more than 256 positions"
    for prompt, key, by_itself, in_company in zip(prompts, keys, alone, together, strict=True):
        assert [each.tokens for each in in_company] == [each.tokens for each in by_itself]
        for sampled in in_company:
            check(prompt, sampled, key)
