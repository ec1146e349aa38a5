"""Scores of a prompt's tokens, compared with one pass of the trainer's trunk."""

import msgspec
import numpy as np
import pytest
from engine_sampling import full_forward_logprobs, load_tiny, make_sampler, request, run_all, sample
from tinsmith.engine import messages
from tinsmith.engine.errors import UserError

LENGTH = 150  # three prefill chunks of 64


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_tiny(tmp_path_factory.mktemp("tiny"), "llama", max_position_embeddings=1024)


@pytest.fixture(scope="module")
def sampler(model):
    return make_sampler(model)


@pytest.fixture(scope="module")
def prompt():
    return np.random.default_rng(0).integers(3, 320, LENGTH)


@pytest.fixture(scope="module")
def reference(model, prompt):
    """Row i has the log-probs at prompt position i + 1."""
    return full_forward_logprobs(model, prompt)[:-1]


def asking(request_id, prompt, *, last_n=None, targets=None, draws=0, logprobs=False, **params):
    asked = request(request_id, prompt, logprobs=logprobs, max_tokens=1, **params)
    return msgspec.structs.replace(
        asked, prompt_logprobs_last_n=last_n, prompt_targets=targets, prompt_alternatives=draws
    )


def dense(tokens):
    return messages.PromptCells(tokens.shape, tokens.astype(np.int32).tobytes())


def random_targets(rows, columns, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 320, (rows, columns))
    return np.where(rng.random((rows, columns)) < 0.5, -1, tokens)


def expected_of(tokens, reference):
    scored = np.take_along_axis(reference, np.maximum(tokens, 0), axis=1)
    return np.where(tokens < 0, 0.0, scored)


@pytest.mark.parametrize("columns", [1, 5, 20])
def test_dense_targets(sampler, prompt, reference, columns):
    tokens = random_targets(LENGTH - 1, columns)
    output = sample(sampler, asking("t", prompt, targets=dense(tokens)))
    cells = output.prompt_targets
    assert (cells.shape, cells.crow_indices, output.prompt_logprobs) == (tokens.shape, None, None)
    scores = np.frombuffer(cells.values, np.float32).reshape(cells.shape)
    np.testing.assert_allclose(scores, expected_of(tokens, reference), atol=1e-4)
    assert (scores[tokens < 0] == 0.0).all()


def test_sparse_targets_come_back_in_their_layout(sampler, prompt, reference):
    tokens = random_targets(LENGTH - 1, 30, seed=2)
    tokens[:40] = -1  # whole rows of nothing
    listed = (tokens >= 0) | (np.random.default_rng(3).random(tokens.shape) < 0.1)  # some -1 are listed
    crow = np.concatenate([[0], listed.sum(1).cumsum()])
    cols = np.nonzero(listed)[1]
    asked = messages.PromptCells(
        tokens.shape,
        tokens[listed].astype(np.int32).tobytes(),
        crow.astype(np.int64).tobytes(),
        cols.astype(np.int64).tobytes(),
    )
    cells = sample(sampler, asking("t", prompt, targets=asked)).prompt_targets
    assert (cells.shape, cells.crow_indices, cells.col_indices) == (
        asked.shape,
        asked.crow_indices,
        asked.col_indices,
    )
    scores = np.frombuffer(cells.values, np.float32)
    np.testing.assert_allclose(scores, expected_of(tokens, reference)[listed], atol=1e-4)


def test_the_last_n_alone_are_scored_and_the_rest_may_come_from_the_cache(model, prompt, reference):
    sampler = make_sampler(model)
    sample(sampler, asking("first", prompt))
    for n, hit in ((1, 144), (20, 128), (LENGTH - 1, 0)):  # pages of 16, up to the token before the first
        asked = asking(f"last {n}", prompt, last_n=n, logprobs=True)
        output = sample(sampler, msgspec.structs.replace(asked, topk_prompt_logprobs=2))
        scores = np.frombuffer(output.prompt_logprobs, np.float32)
        assert np.isnan(scores[:-n]).all()
        own = np.take_along_axis(reference, prompt[1:, None], axis=1)[:, 0]
        np.testing.assert_allclose(scores[-n:], own[-n:], atol=1e-4)
        top = np.frombuffer(output.topk_prompt_logprobs.logprobs, np.float32).reshape(LENGTH, 2)
        assert (top[:-n] == -99999.0).all()
        np.testing.assert_allclose(top[-n:], -np.sort(-reference, 1)[-n:, :2], atol=1e-4)
        assert output.prompt_cache_hit_tokens == hit


def test_alternatives_are_draws_of_the_tempered_distribution(sampler, prompt, reference):
    def draw(seed, temperature, k=64):
        asked = asking("d", prompt, draws=k, seed=seed, temperature=temperature)
        drawn = sample(sampler, asked).prompt_alternatives
        tokens = np.frombuffer(drawn.token_ids, np.int32).reshape(LENGTH - 1, k)
        logprobs = np.frombuffer(drawn.logprobs, np.float32).reshape(LENGTH - 1, k)
        np.testing.assert_allclose(logprobs, np.take_along_axis(reference, tokens, 1), atol=1e-4)
        return tokens

    assert (draw(0, 0.0, 3) == reference.argmax(1)[:, None]).all()
    temperature, runs = 0.5, 8
    tokens = np.concatenate([draw(seed, temperature) for seed in range(runs)], axis=1)
    assert (draw(0, temperature) == tokens[:, :64]).all(), "the same seed, the same draws"
    p = np.exp(reference / temperature)
    p /= p.sum(1, keepdims=True)
    # Summed over all positions: how often each token is drawn, within five standard deviations.
    counts = np.bincount(tokens.ravel(), minlength=p.shape[1])
    draws = tokens.shape[1]
    deviation = np.sqrt((p * (1 - p)).sum(0) * draws)
    assert (np.abs(counts - p.sum(0) * draws) < 5 * deviation + 1).all()


def test_questions_of_several_prompts_in_one_row_do_not_mix(model, prompt):
    crowd, alone = make_sampler(model), make_sampler(model)
    asked = []
    for i, n in enumerate((5, 9, 20, 12)):
        asked.append(
            asking(
                f"{i}",
                prompt[i : i + n],
                draws=i,
                seed=i,
                logprobs=i != 1,
                last_n=3 if i == 2 else None,
                targets=dense(random_targets(n - 1, 2 * i + 1, i)) if i else None,
            )
        )
        crowd.add(asked[-1])
    answers = run_all(crowd)
    for one in asked:
        ours, theirs = answers[one.request_id], sample(alone, one)
        for field, dtype in (("prompt_targets", "values"), ("prompt_alternatives", "logprobs")):
            mine, other = getattr(ours, field), getattr(theirs, field)
            assert (mine is None) == (other is None)
            if mine is not None:
                np.testing.assert_allclose(
                    *(np.frombuffer(getattr(x, dtype), np.float32) for x in (mine, other)), atol=1e-4
                )
        if ours.prompt_alternatives is not None:
            assert ours.prompt_alternatives.token_ids == theirs.prompt_alternatives.token_ids


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"last_n": 2}, "prompt_logprobs_last_n: it applies"),
        ({"last_n": 3, "logprobs": True}, "between 1 and the prompt's 3 tokens less one"),
        ({"last_n": 0, "logprobs": True}, "prompt_logprobs_last_n: 0"),
        ({"draws": 65}, "prompt_alt_tokens_k: 65"),
        ({"targets": dense(np.full((3, 1), 4))}, "3 rows; a prompt of 3 tokens needs 2"),
        ({"targets": dense(np.full((2, 1), 320))}, "token 320"),
        ({"targets": dense(np.full((2, 1), -2))}, "token -2"),
        ({"targets": dense(np.full((2, 1), -1))}, "names no token"),
        ({"targets": dense(np.full((2, 5000), 1))}, "5000 tokens at one position"),
        ({"min_p": 1.5}, "min_p"),
    ],
)
def test_bad_questions_are_refused_by_name(sampler, wrong, text):
    with pytest.raises(UserError, match=text):
        sampler.add(asking("w", [4, 5, 6], **wrong))
    assert not sampler.has_work
