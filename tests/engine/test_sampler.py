"""The sampler: log-probs, stops, sharing, memory, cancelling; everything against the request run alone or
against one pass of the trainer's trunk. Mixes of requests: test_sampler_mixes."""

from collections import deque
from itertools import chain

import jax
import msgspec
import numpy as np
import pytest
from engine_sampling import (
    alone_and_together,
    full_forward_logprobs,
    load_tiny,
    make_sampler,
    random_adapter,
    request,
    run_all,
    sample,
    sequences,
)
from tinsmith.engine import messages
from tinsmith.engine.errors import UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_tiny(tmp_path_factory.mktemp("tiny"), "qwen3", max_position_embeddings=1024)


@pytest.fixture(scope="module")
def adapters(model):
    return {"a": random_adapter(model.config, 1), "b": random_adapter(model.config, 2, train_unembed=False)}


@pytest.fixture
def sampler(model, adapters):
    sampler = make_sampler(model)
    for key, adapter in adapters.items():
        sampler.register(key, adapter, scale=2.0)
    return sampler


def prompt_of(length, seed=0):
    return np.random.default_rng(seed).integers(3, 320, length)


def check_logprobs(model, prompt, sampled, temperature=1.0, adapter=None):
    reference = full_forward_logprobs(model, [*prompt, *sampled.tokens], temperature, adapter, 2.0)
    rows = len(prompt) - 1 + np.arange(len(sampled.tokens))
    np.testing.assert_allclose(sampled.logprobs, reference[rows, sampled.tokens], atol=1e-4)


def test_logprobs_over_512_tokens_are_those_of_one_full_forward(model, sampler, adapters):
    prompt = prompt_of(100)
    for key in (None, "a"):
        asked = request(key, prompt, logprobs=True, max_tokens=512, temperature=0.8, stop_tokens=[], seed=4)
        output = sample(sampler, asked, key)
        (sampled,) = sequences(output)
        assert len(sampled.tokens) == 512
        assert sampled.stop_reason == "length"
        check_logprobs(model, prompt, sampled, 0.8, adapters.get(key))
        reference = full_forward_logprobs(model, prompt, 1.0, adapters.get(key), 2.0)
        scores = np.frombuffer(output.prompt_logprobs, np.float32)
        assert np.isnan(scores[0])
        np.testing.assert_allclose(scores[1:], reference[np.arange(99), prompt[1:]], atol=1e-4)


def test_a_request_that_lost_its_pages_goes_on_as_if_nothing_had_happened(model):
    sampler = make_sampler(model)
    asked = [
        request(i, prompt_of(150, seed=i), 2, seed=i, logprobs=True, max_tokens=150, stop_tokens=[])
        for i in range(2)
    ]
    alone, together, lost = alone_and_together(sampler, asked)
    assert lost, "four sequences of 300 tokens do not fit into 704"
    for ours, theirs in zip(chain(*together), chain(*alone), strict=True):
        assert ours.tokens == theirs.tokens
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-4)


def test_samples_of_one_seed_differ_and_come_again(sampler):
    asked = request(0, prompt_of(20), 16, seed=2**70 + 3, max_tokens=8, stop_tokens=[])
    first, second = (sequences(sample(sampler, asked)) for _ in range(2))
    assert [s.tokens for s in first] == [s.tokens for s in second]
    assert len({tuple(s.tokens) for s in first}) == 16
    unseeded = [
        sequences(sample(sampler, request(i, prompt_of(20), max_tokens=8, stop_tokens=[])))[0].tokens
        for i in range(2)
    ]
    assert unseeded[0] != unseeded[1]


def test_stop_rules(model, sampler):
    prompt = prompt_of(10)
    asked = {"temperature": 0.0, "max_tokens": 40}
    (free,) = sequences(sample(sampler, request(0, prompt, **asked, stop_tokens=[])))
    assert len(free.tokens) == 40
    # the 6th token as a stop: included, with its log-prob
    sixth = free.tokens[5]
    first_at = free.tokens.index(sixth) + 1
    (stopped,) = sequences(sample(sampler, request(1, prompt, **asked, stop_tokens=[sixth])))
    assert stopped.tokens == free.tokens[:first_at]
    assert stopped.stop_reason == "stop"
    np.testing.assert_allclose(stopped.logprobs, free.logprobs[:first_at], atol=1e-5)
    # more stop tokens than the device looks at
    many = [*[t for t in range(320) if t not in free.tokens][:20], sixth]
    (stopped,) = sequences(sample(sampler, request(2, prompt, **asked, stop_tokens=many)))
    assert stopped.tokens == free.tokens[:first_at]
    # the length limit itself
    (cut,) = sequences(sample(sampler, request(3, prompt, temperature=0.0, max_tokens=1, stop_tokens=[])))
    assert (cut.tokens, cut.stop_reason) == (free.tokens[:1], "length")


def test_the_models_own_end_is_the_implicit_stop_unless_stops_are_given(model):
    eos = model.config.eos_token_ids[0]
    sampler = make_sampler(model)
    lengths = {}
    for name, stops in (
        ("implicit", {}),
        ("none", {"stop_tokens": []}),
        ("strings", {"stop_strings": ["never said"]}),
    ):
        asked = request(name, prompt_of(5), 32, seed=1, max_tokens=120, **stops)
        lengths[name] = sequences(sample(sampler, asked))
    ended = [s for s in lengths["implicit"] if s.stop_reason == "stop"]
    assert ended, "of 32 samples of 120 random tokens of 320 some must end"
    assert all(s.tokens[-1] == eos and eos not in s.tokens[:-1] for s in ended)
    for name in ("none", "strings"):
        assert all(len(s.tokens) == 120 and s.stop_reason == "length" for s in lengths[name])
        assert any(eos in s.tokens for s in lengths[name])


def test_absent_max_tokens_goes_up_to_the_context_limit(model):
    sampler = make_sampler(model, max_sequence_length=60)
    output = sample(sampler, request(0, prompt_of(30), 2, stop_tokens=[]))
    for sampled in sequences(output):
        assert sampled.stop_reason == "length"
        assert 30 + len(sampled.tokens) == 60


def test_compute_logprobs_of_a_prompt_as_long_as_the_limit(model):
    sampler = make_sampler(model, max_sequence_length=300)
    prompt = prompt_of(300)
    output = sample(sampler, request(0, prompt, logprobs=True, topk_prompt=4, max_tokens=1))
    reference = full_forward_logprobs(model, prompt)
    scores = np.frombuffer(output.prompt_logprobs, np.float32)
    np.testing.assert_allclose(scores[1:], reference[np.arange(299), prompt[1:]], atol=1e-4)
    top = output.topk_prompt_logprobs
    tokens = np.frombuffer(top.token_ids, np.int32).reshape(300, 4)
    logprobs = np.frombuffer(top.logprobs, np.float32).reshape(300, 4)
    assert (tokens[0] == 0).all()
    assert (logprobs[0] == -99999.0).all()
    np.testing.assert_allclose(logprobs[1:], -np.sort(-reference[:-1], axis=-1)[:, :4], atol=1e-4)
    chosen = np.take_along_axis(reference[:-1], tokens[1:], axis=-1)
    np.testing.assert_allclose(chosen, logprobs[1:], atol=1e-4)


def test_topk_of_the_sampled_tokens(model, sampler):
    prompt = prompt_of(12)
    output = sample(
        sampler, request(0, prompt, topk=3, max_tokens=5, temperature=0.5, stop_tokens=[], seed=1)
    )
    (sampled,) = sequences(output)
    reference = full_forward_logprobs(model, [*prompt, *sampled.tokens], 0.5)[11:16]
    top = output.sequences[0].topk
    assert (top.k, top.length) == (3, 5)
    np.testing.assert_allclose(
        np.frombuffer(top.logprobs, np.float32).reshape(5, 3), -np.sort(-reference, -1)[:, :3], atol=1e-4
    )


def test_cancelled_requests_leave_at_once_and_disturb_no_other(sampler):
    kept = request("kept", prompt_of(40), 3, seed=5, max_tokens=60, stop_tokens=[])
    expected = sequences(sample(sampler, kept))
    free = sampler._pool.num_free
    sampler.add(kept)
    for i in range(3):
        sampler.add(request(i, prompt_of(90, seed=i), 4, max_tokens=200, stop_tokens=[]))
    for i in range(3):  # waiting, prefilling, running
        sampler.step()
        sampler.step()
        assert sampler.cancel(str(i))
        assert not sampler.cancel(str(i))
    answers = run_all(sampler)
    assert list(answers) == ["kept"]
    assert [s.tokens for s in sequences(answers["kept"])] == [s.tokens for s in expected]
    assert sampler._pool.num_free == free


def test_requests_that_arrive_together_decode_together_and_running_ones_wait_for_one_row(sampler):
    for i in range(4):  # each prompt is a row, each answer a chunk
        sampler.add(request(i, prompt_of(60, seed=i), max_tokens=8, stop_tokens=[]))
    assert [len(sampler.step()) for _ in range(5)] == [0, 0, 0, 0, 4]

    sampler.add(request("runs", prompt_of(60), max_tokens=64, stop_tokens=[]))
    sampler.step()
    sampler.step()
    (runs,) = sampler._queue.running
    for i in range(3):
        sampler.add(request(i, prompt_of(60, seed=i), max_tokens=8, stop_tokens=[]))
    lengths = []
    for _ in range(6):
        sampler.step()
        lengths.append(len(runs.tokens))
    assert lengths == [68, 76, 76, 84, 84, 92]


def test_a_second_turn_finds_the_first_in_the_cache(model, sampler, adapters):
    first = request(0, prompt_of(50), max_tokens=30, seed=1, stop_tokens=[])
    (sampled,) = sequences(sample(sampler, first, "a"))
    prompt = [*prompt_of(50), *sampled.tokens, *prompt_of(9, seed=5)]
    second = request(1, prompt, max_tokens=10, seed=2, stop_tokens=[])
    output = sample(sampler, second, "a")
    assert output.prompt_cache_hit_tokens == 64  # whole pages of the 79 cached tokens
    check_logprobs(model, prompt, sequences(output)[0], adapter=adapters["a"])
    assert sample(sampler, second, "b").prompt_cache_hit_tokens == 0, "other weights, other keys and values"


def test_prompts_that_go_on_from_cached_beginnings_share_a_program(model, sampler, adapters):
    """Two whole pages of each are there; what is missing of the last one does not fit a row of 64."""
    together = make_sampler(model, prefill_tokens=256, max_slots=16, kv_cache_tokens=4096)
    together.register("a", adapters["a"], scale=2.0)
    sample(together, request("first", prompt_of(40), max_tokens=1), "a")
    asked = [
        msgspec.structs.replace(
            request(i, [*prompt_of(40), *prompt_of(length, seed=i)], logprobs=True, max_tokens=8, seed=i),
            prompt_logprobs_last_n=4,
        )
        for i, length in enumerate((5, 20, 33, 50, 12, 65))
    ]
    rows = []
    prefill = together._programs.prefill
    together._programs.prefill = lambda pieces: rows.append(len(pieces)) or prefill(pieces)
    for one in asked:
        together.add(one, "a")
    answers = run_all(together)
    assert rows == [4, 1, 1], "the last two alone: fewer than half of the rows, and too long a one"
    for one in asked:
        answer, expected = answers[one.request_id], sample(sampler, one, "a")
        assert answer.prompt_cache_hit_tokens == 32
        (ours,), (theirs,) = sequences(answer), sequences(expected)
        assert ours.tokens == theirs.tokens
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5)
        prompt = np.frombuffer(one.prompt, np.int32)
        check_logprobs(model, prompt, ours, adapter=adapters["a"])
        scores = [np.frombuffer(output.prompt_logprobs, np.float32) for output in (answer, expected)]
        assert np.isfinite(scores[0]).sum() == 4
        np.testing.assert_allclose(*scores, atol=1e-5)


def test_prompts_that_arrive_together_have_their_common_beginning_computed_once(model, adapters):
    """A group of an RL loop is such a case. 100 tokens are six whole pages, three more, and the last, not
    cached."""
    together = make_sampler(model, prefill_tokens=256, max_slots=16, kv_cache_tokens=4096)
    for key, adapter in adapters.items():
        together.register(key, adapter, scale=2.0)
    group = [request(f"same {i}", prompt_of(100), max_tokens=8, seed=i) for i in range(5)]
    tail = [*prompt_of(70), *prompt_of(40, seed=3)]
    group.append(request("begins alike", tail, max_tokens=8, seed=7))
    scored = request("is scored", prompt_of(100), logprobs=True, max_tokens=8, seed=8)
    group.append(msgspec.structs.replace(scored, prompt_logprobs_last_n=50))
    group.append(request("whole pages", prompt_of(97), max_tokens=8, seed=9))
    computed = []
    prefill = together._programs.prefill
    together._programs.prefill = lambda pieces: computed.append([n for _, n in pieces]) or prefill(pieces)
    for one in group:
        together.add(one, "a")
    together.add(request("other weights", prompt_of(100), max_tokens=8, seed=6), "b")
    answers = run_all(together)
    hits = {request_id: answer.prompt_cache_hit_tokens for request_id, answer in answers.items()}
    assert hits == {
        **{f"same {i}": 96 for i in range(5)},
        "same 0": 0,
        "begins alike": 64,
        "is scored": 48,  # the token before the first of its last fifty must be computed
        "whole pages": 96,  # all that it needs
        "other weights": 0,
    }
    assert sum(map(sum, computed)) == 99 + 4 * 3 + (109 - 64) + (99 - 48) + 99
    assert together._pool.num_free == 4096 // 16, "every page came back"
    for one in group:
        answer = answers[one.request_id]
        check_logprobs(model, np.frombuffer(one.prompt, np.int32), *sequences(answer), adapter=adapters["a"])
    alone = make_sampler(model)
    alone.register("a", adapters["a"], scale=2.0)
    for one in group:
        answer, expected = answers[one.request_id], sample(alone, one, "a")
        assert sequences(answer)[0].tokens == sequences(expected)[0].tokens
        if one.prompt_logprobs:
            scores = [np.frombuffer(output.prompt_logprobs, np.float32) for output in (answer, expected)]
            assert np.isfinite(scores[0]).sum() == 50
            np.testing.assert_allclose(*scores, atol=1e-5)


@pytest.mark.parametrize("weights_are_more", [False, True])
def test_a_long_context_is_not_read_for_short_ones(model, sampler, weights_are_more):
    """Unless the weights are more to read than it is. New ones do not push it aside."""
    mixed = make_sampler(model, max_slots=16, kv_cache_tokens=4096)
    if weights_are_more:
        mixed._queue._weights_positions = 10**6
    long = request("long", prompt_of(400), max_tokens=40, stop_tokens=[], seed=1)
    short = [request(i, prompt_of(20, seed=i), max_tokens=16, stop_tokens=[], seed=i) for i in range(12)]
    batches = []
    decode = mixed._programs.decode
    mixed._programs.decode = lambda chosen, *of: (
        batches.append([len(s.tokens) for s in chosen]) or decode(chosen, *of)
    )
    mixed.add(long)
    answers, waiting = {}, deque(short)
    while mixed.has_work:
        if waiting and len(mixed._generations) < 4:
            mixed.add(waiting.popleft())
        answers |= {answer.request_id: answer.output for answer in mixed.step()}
    longs = [index for index, batch in enumerate(batches) if max(batch) > 384]
    assert len(longs) == 5
    assert longs[-1] - longs[0] <= 8, "every second chunk at least"
    assert any(len(batches[index]) > 1 for index in longs) == weights_are_more
    for one in (long, *short):
        (ours,), (alone,) = sequences(answers[one.request_id]), sequences(sample(sampler, one))
        assert ours.tokens == alone.tokens
        np.testing.assert_allclose(ours.logprobs, alone.logprobs, atol=1e-5)


def test_before_a_turn_it_names_the_requests_that_are_computed_in_it(sampler):
    sampler.add(request("runs", prompt_of(30), 2, max_tokens=64, stop_tokens=[]))
    for index in range(3):
        sampler.add(request(index, prompt_of(60, seed=index), max_tokens=8, stop_tokens=[]))
    named = []
    for _ in range(6):
        sampler.step(lambda requests: named.append([each.request_id for each in requests]))
    assert named[:4] == [["runs"], ["0"], ["1"], ["runs", "0", "1"]]


def test_registered_weights_do_not_change_with_their_source(model, sampler):
    adapter = random_adapter(model.config, 7)
    asked = request(0, prompt_of(8), seed=3, max_tokens=10, stop_tokens=[])
    sampler.register("snapshot", adapter, scale=1.0)
    before = sequences(sample(sampler, asked, "snapshot"))[0]
    for leaf in jax.tree.leaves(adapter):
        leaf[...] = 0
    assert sequences(sample(sampler, asked, "snapshot"))[0].tokens == before.tokens
    with pytest.raises(ValueError, match="already registered"):
        sampler.register("snapshot", adapter)
    sampler.release("snapshot")
    assert "snapshot" not in sampler
    with pytest.raises(KeyError):
        sampler.add(asked, "snapshot")


def test_full_weights_sample_beside_adapters(model, sampler):
    own = jax.tree.map(lambda w: w * 0.9, model.base)
    sampler.register("full", base=own)
    asked = request("full", prompt_of(20), seed=3, max_tokens=12, stop_tokens=[])
    sampler.add(asked, "full")
    sampler.add(request("other", prompt_of(20), seed=3, max_tokens=12, stop_tokens=[]), "a")
    answers = run_all(sampler)
    check_logprobs(model._replace(base=own), prompt_of(20), sequences(answers["full"])[0])


def test_weights_that_are_not_finite_fail_their_request_alone(model, sampler):
    broken = random_adapter(model.config, 4)
    broken["layers"]["up_proj"]["a"][...] = np.nan
    sampler.register("broken", broken)
    sampler.add(request("broken", prompt_of(5), 3, max_tokens=5), "broken")
    sampler.add(request("fine", prompt_of(5), max_tokens=5, stop_tokens=[]), "a")
    answers = run_all(sampler)
    assert isinstance(answers["broken"], messages.Failed)
    assert answers["broken"].category == "user"
    assert len(sequences(answers["fine"])[0].tokens) == 5


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"prompt": []}, "prompt: it has no tokens"),
        ({"prompt": [5, 320]}, "token 320 at position 1"),
        ({"prompt": [-1]}, "token -1 at position 0"),
        ({"prompt": [3] * 1025}, "1025 tokens"),
        ({"num_samples": 0}, "num_samples"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -0.5}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"topk": 65}, "topk_sample_logprobs"),
        ({"topk_prompt": -1}, "topk_prompt_logprobs"),
    ],
)
def test_bad_requests_are_refused_by_name(sampler, wrong, text):
    with pytest.raises(UserError, match=text):
        sampler.add(request(0, **({"prompt": [4, 5]} | wrong)))
    assert not sampler.has_work
