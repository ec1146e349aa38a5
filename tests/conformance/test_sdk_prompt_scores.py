"""Questions about a prompt's tokens through the unmodified SDK, against the trainer's log-probs."""

from __future__ import annotations

import numpy as np
import pytest
import tinker
from tinker import types

PROMPT = [5, 9, 33, 2, 71, 8, 14, 100, 3, 27]
ROWS = len(PROMPT) - 1


@pytest.fixture(scope="module")
def scored(server) -> tuple[tinker.SamplingClient, np.ndarray]:
    """A sampler, and log p(token | the prompt so far) at prompt positions 1.. for tokens 0..9, as the trainer
    that it was saved from tells them."""
    service = tinker.ServiceClient(base_url=server.url, api_key="tml-alice")
    training = service.create_lora_training_client(base_model="tiny", rank=4, seed=3).result()
    data = [
        types.Datum(
            model_input=types.ModelInput.from_ints(PROMPT[:-1]),
            loss_fn_inputs={"target_tokens": [token] * ROWS, "weights": [1.0] * ROWS},
        )
        for token in range(10)
    ]
    training.forward_backward(data, "cross_entropy").result()
    training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    output = training.forward(data, "cross_entropy").result()
    logprobs = np.stack([np.asarray(one["logprobs"].data) for one in output.loss_fn_outputs], axis=1)
    return training.save_weights_and_get_sampling_client().result(), logprobs


def ask(sampler: tinker.SamplingClient, **questions) -> types.SampleResponse:
    params = types.SamplingParams(max_tokens=1, seed=1, temperature=questions.pop("temperature", 1.0))
    prompt = types.ModelInput.from_ints(PROMPT)
    return sampler.sample(prompt=prompt, num_samples=1, sampling_params=params, **questions).result()


def targets() -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.where(rng.random((ROWS, 4)) < 0.6, -1, rng.integers(0, 10, (ROWS, 4)))


def test_dense_target_prompt_logprobs(scored) -> None:
    sampler, logprobs = scored
    tokens = targets()
    response = ask(sampler, target_prompt_logprobs=types.TensorData.from_numpy(tokens))
    found = response.target_prompt_logprobs.to_numpy()
    assert found.dtype == np.float32
    expected = np.where(tokens < 0, 0.0, np.take_along_axis(logprobs, np.maximum(tokens, 0), 1))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_sparse_target_prompt_logprobs(scored) -> None:
    torch = pytest.importorskip("torch")
    sampler, logprobs = scored
    tokens = np.concatenate([targets(), np.full((ROWS, 20), -1)], axis=1)
    asked = types.TensorData.from_torch_sparse(torch.tensor(tokens), pad_value=-1)
    assert asked.sparse_crow_indices is not None
    found = ask(sampler, target_prompt_logprobs=asked).target_prompt_logprobs
    assert found.sparse_crow_indices == asked.sparse_crow_indices
    assert found.sparse_col_indices == asked.sparse_col_indices
    expected = np.where(tokens < 0, 0.0, np.take_along_axis(logprobs, np.maximum(tokens, 0), 1))
    np.testing.assert_allclose(found.to_torch().numpy(), expected, atol=1e-4)


def test_prompt_logprobs_of_the_last_n(scored) -> None:
    sampler, _ = scored
    whole = ask(sampler, include_prompt_logprobs=True, topk_prompt_logprobs=3)
    last = ask(sampler, include_prompt_logprobs=True, topk_prompt_logprobs=3, prompt_logprobs_last_n=4)
    assert last.prompt_logprobs[:-4] == [None] * (len(PROMPT) - 4)
    assert last.topk_prompt_logprobs[:-4] == [None] * (len(PROMPT) - 4)
    np.testing.assert_allclose(last.prompt_logprobs[-4:], whole.prompt_logprobs[-4:], atol=1e-4)
    assert [len(row) for row in last.topk_prompt_logprobs[-4:]] == [3] * 4


def test_alternatives_to_the_prompts_tokens(scored) -> None:
    sampler, _ = scored
    drawn = ask(sampler, prompt_alt_tokens_k=5, temperature=0.7).prompt_alt_tokens
    tokens, found = drawn.tokens.to_numpy(), drawn.logprobs.to_numpy()
    assert tokens.shape == found.shape == (ROWS, 5)
    # The alternatives' own log-probs, asked for by name.
    named = ask(sampler, target_prompt_logprobs=types.TensorData.from_numpy(tokens.astype(np.int64)))
    np.testing.assert_allclose(found, named.target_prompt_logprobs.to_numpy(), atol=1e-4)
    again = ask(sampler, prompt_alt_tokens_k=5, temperature=0.7).prompt_alt_tokens
    assert (again.tokens.to_numpy() == tokens).all()
    greedy = ask(sampler, prompt_alt_tokens_k=1, temperature=0.0, topk_prompt_logprobs=1)
    best = [row[0][0] for row in greedy.topk_prompt_logprobs[1:]]
    assert greedy.prompt_alt_tokens.tokens.to_numpy()[:, 0].tolist() == best


@pytest.mark.parametrize(
    ("question", "text"),
    [
        ({"topk_prompt_logprobs": 65}, "topk_prompt_logprobs"),
        ({"topk_sample_logprobs": 65}, "topk_sample_logprobs"),
        ({"prompt_alt_tokens_k": 65}, "prompt_alt_tokens_k"),
        ({"target_prompt_logprobs": types.TensorData.from_numpy(np.ones((3, 1), np.int64))}, "rows"),
    ],
)
def test_values_over_a_limit_are_refused_by_name(scored, question, text) -> None:
    with pytest.raises(tinker.TinkerError, match=text):
        ask(scored[0], **question)


def test_a_sample_that_fills_the_context_is_scored_to_its_end(server) -> None:
    """`compute_logprobs` and `forward` take what sampling returns, and give the same log-probs."""
    service = tinker.ServiceClient(base_url=server.url, api_key="tml-alice")
    training = service.create_lora_training_client(base_model="tiny", rank=4, seed=3).result()
    sampler = training.save_weights_and_get_sampling_client().result()
    (model,) = service.get_server_capabilities().supported_models
    context = model.max_context_length
    prompt, params = types.ModelInput.from_ints(PROMPT), types.SamplingParams(seed=2, stop=[])
    (sequence,) = sampler.sample(prompt=prompt, num_samples=1, sampling_params=params).result().sequences
    tokens = [*PROMPT, *sequence.tokens]
    assert (len(tokens), sequence.stop_reason) == (context, "length")
    scores = sampler.compute_logprobs(types.ModelInput.from_ints(tokens)).result()
    np.testing.assert_allclose(scores[len(PROMPT) :], sequence.logprobs, atol=1e-4)
    # A model_input may have as many tokens as the context too, each with a target.
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(tokens),
        loss_fn_inputs={"target_tokens": [*tokens[1:], 5], "weights": [1.0] * context},
    )
    output = training.forward([datum], "cross_entropy").result().loss_fn_outputs[0]
    np.testing.assert_allclose(output["logprobs"].data[len(PROMPT) - 1 : -1], sequence.logprobs, atol=1e-4)
    longer = types.ModelInput.from_ints([*tokens, 5])
    with pytest.raises(tinker.BadRequestError, match=f"{context + 1} tokens are over"):
        sampler.compute_logprobs(longer).result()
    with pytest.raises(tinker.BadRequestError, match=f"over the model's limit of {context - 1}"):
        sampler.sample(
            prompt=types.ModelInput.from_ints(tokens),
            num_samples=1,
            sampling_params=types.SamplingParams(max_tokens=2),
        ).result()
