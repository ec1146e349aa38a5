"""A device that runs out of memory: once more with smaller micro-batches, then its owner alone is told."""

import jax
import numpy as np
import pytest
from engine_training import lora, make_trainer, operation, random_data, run, with_random_b, worst
from tinsmith.engine.errors import UserError
from tinsmith.engine.training import gradient_programs
from tinsmith.engine.training.gradient_programs import GradientPrograms
from tinsmith.engine.training.packing import shape_table

LENGTHS = [9, 30, 3, 30, 17, 1, 25, 30, 12]
TABLE = {"max_sequence_length": 128, "micro_batch_tokens": 64}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return make_trainer(tmp_path_factory.mktemp("model"), **TABLE)


@pytest.fixture
def sizes(monkeypatch):
    """The tokens of each micro-batch that the device is given; it has no memory for more than
    `sizes.limit`."""

    class Sizes(list):
        limit = 10**9

    sizes = Sizes()
    run_gradients = GradientPrograms.run_gradients

    def limited(self, states, gradients, batch, sequence_level):
        sizes.append(batch.tokens.size)
        if batch.tokens.size > sizes.limit:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
        return run_gradients(self, states, gradients, batch, sequence_level)

    monkeypatch.setattr(GradientPrograms, "run_gradients", limited)
    return sizes


def models(trainer):
    return [with_random_b(trainer.create(lora(4, seed=seed)), seed) for seed in (1, 2)]


def jobs(trainer, states):
    return [trainer.job(state, operation(random_data(LENGTHS, seed))) for seed, state in enumerate(states)]


def test_gradients_after_a_retry_are_those_without(trainer, sizes):
    expected, states = models(trainer), models(trainer)
    want = trainer.forward_backward(jobs(trainer, expected))
    assert max(sizes) == 64
    sizes.clear()
    sizes.limit = 32
    got = trainer.forward_backward(jobs(trainer, states))
    first_failure = next(at for at, size in enumerate(sizes) if size > 32)
    assert max(sizes[first_failure + 1 :]) <= 32
    for one, other, state, reference in zip(got, want, states, expected, strict=True):
        assert worst(state.gradients, reference.gradients) < 1e-5
        assert state.valid_tokens == reference.valid_tokens
        assert one.metrics["loss:sum"] == pytest.approx(other.metrics["loss:sum"], rel=1e-5)
        for found, logprobs in zip(one.logprobs, other.logprobs, strict=True):
            np.testing.assert_allclose(found, logprobs, atol=2e-5)


def test_it_is_tried_once_more_and_no_more(trainer, sizes):
    state = models(trainer)[0]
    run(trainer, state, random_data(LENGTHS))
    before = jax.tree.map(np.array, state.gradients)
    sizes.clear()
    sizes.limit = 0
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        run(trainer, state, random_data(LENGTHS))
    assert len(sizes) == 2
    assert sizes[1] < sizes[0]
    assert worst(state.gradients, before) == 0


def test_a_datum_that_cannot_be_cut_is_not_tried_again(trainer, sizes):
    sizes.limit = 0
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        run(trainer, models(trainer)[0], random_data([128]))
    assert sizes == [128]


def test_other_errors_are_not_tried_again(trainer, monkeypatch):
    monkeypatch.setattr(GradientPrograms, "run_gradients", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(trainer, models(trainer)[0], random_data(LENGTHS))


def test_a_micro_batch_that_cannot_fit_is_refused_before_it_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(gradient_programs, "free_bytes", lambda device: 1 << 16)
    trainer = make_trainer(tmp_path / "model", **TABLE)
    state = trainer.create(lora(4))
    with pytest.raises(UserError, match=r"of 1 x 8 tokens takes .* are free; send shorter datums"):
        run(trainer, state, random_data([7, 8]))
    assert state.gradients is None


@pytest.mark.parametrize(("longest", "tokens", "devices"), [(128, 64, 1), (2048, 8192, 1), (4096, 65536, 8)])
def test_half_a_table_has_no_new_shapes(longest, tokens, devices):
    table = shape_table(longest, tokens, devices)
    half = table.halved()
    assert set(half.shapes) <= set(table.shapes)
    assert half.rows.keys() == table.rows.keys()
    for length, counts in half.rows.items():
        assert max(counts) * length <= tokens // 2 or counts == table.rows[length][:1]
