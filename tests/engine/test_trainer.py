"""The trainer's promises to its callers, on a tiny model."""

import subprocess
import sys
from pathlib import Path

import jax
import msgspec
import numpy as np
import pytest
from engine_training import (
    datum,
    lora,
    make_trainer,
    operation,
    random_data,
    run,
    tensor,
    with_random_b,
    worst,
)
from tinsmith.engine.errors import UserError
from tinsmith.engine.messages import AdamParams, DimuonParams
from tinsmith.engine.training.device_batch import NonFiniteError
from tinsmith.engine.training.training_state import TrainingState
from tinsmith.losses import REGISTRY

ADAM = AdamParams(learning_rate=1e-2, eps=1e-8)
LENGTHS = [9, 64, 3, 30, 17, 1, 40]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return make_trainer(tmp_path_factory.mktemp("model"))


def model(trainer, seed=1, rank=4, **options):
    return with_random_b(trainer.create(lora(rank, seed=seed), **options), seed)


def snapshot(state):
    return jax.tree.map(np.array, state.arrays())


def same(before, state):
    after = snapshot(state)
    return jax.tree.structure(before) == jax.tree.structure(after) and all(
        (a == b).all() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    )


def test_outputs_come_in_the_clients_order_and_packing_changes_nothing(trainer):
    state = model(trainer)
    data = random_data(LENGTHS)
    together = run(trainer, state, data, forward_only=True)
    assert [len(lp) for lp in together.logprobs] == LENGTHS
    for one, logprobs in zip(data, together.logprobs, strict=True):
        alone = run(trainer, state, [one], forward_only=True)
        np.testing.assert_allclose(logprobs, alone.logprobs[0], atol=2e-5)
    weights = [np.frombuffer(d.inputs["weights"].data, np.float32) for d in data]
    want = -sum(float(w @ lp) for w, lp in zip(weights, together.logprobs, strict=True))
    assert together.metrics["loss:sum"] == pytest.approx(want, rel=1e-4)
    assert all(key.count(":") == 1 for key in together.metrics)
    assert state.gradients is None


@pytest.mark.parametrize("forward_only", [False, True])
def test_elementwise_losses_follow_the_formula_and_add_up(trainer, forward_only):
    """They have the client's order and layout, and come only if requested, even if models share a batch."""
    data = random_data(LENGTHS, loss="importance_sampling")
    labels = datum([5, 6, 7, 8], labels=np.array([-100, 6, 9, 8]))
    asked = msgspec.structs.replace(
        operation(data, "importance_sampling", forward_only=forward_only), elementwise_loss=True
    )
    laid_out = msgspec.structs.replace(operation([labels], forward_only=forward_only), elementwise_loss=True)
    jobs = [
        trainer.job(model(trainer), asked),
        trainer.job(model(trainer, seed=2), operation(data[:2], "importance_sampling", None, forward_only)),
        trainer.job(model(trainer, seed=3, target_alignment="by_shape"), laid_out),
    ]
    first, second, third = trainer.forward_backward(jobs)
    for one, logprobs, losses in zip(data, first.logprobs, first.losses, strict=True):
        sampled, advantages = (
            np.frombuffer(one.inputs[name].data, np.float32) for name in ("logprobs", "advantages")
        )
        np.testing.assert_allclose(losses, -np.exp(logprobs - sampled) * advantages, rtol=1e-4, atol=1e-5)
    total = sum(float(losses.sum(dtype=np.float64)) for losses in first.losses)
    assert total == pytest.approx(first.metrics["loss:sum"], rel=1e-4)
    assert second.losses is None
    np.testing.assert_allclose(third.losses[0], -third.logprobs[0], atol=1e-6)
    assert third.losses[0].shape == (3,)


def test_gradients_are_sums_over_calls(trainer):
    once, twice, doubled = (model(trainer) for _ in range(3))
    data = random_data(LENGTHS)
    run(trainer, once, data)
    run(trainer, twice, data[:3])
    run(trainer, twice, data[3:])
    run(trainer, doubled, data + data)
    assert worst(twice.gradients, once.gradients) < 1e-5
    assert worst(doubled.gradients, jax.tree.map(lambda g: 2 * g, once.gradients)) < 1e-5


@pytest.mark.parametrize("name", ["cross_entropy", "importance_sampling", "dro"])
def test_the_trained_gradient_is_that_of_the_loss(trainer, name):
    """It is compared with a finite difference along a random direction of the weights. Another loss compiles
    nothing.

    Of the smooth losses; those with kinks or stopped gradients are compared with formulas in tests/losses.
    """
    state = model(trainer)
    data = random_data(LENGTHS, loss=name)
    compiled = len(trainer.compiled)
    run(trainer, state, data, name)
    assert len(trainer.compiled) - compiled <= (2 if name == "cross_entropy" else 0)
    rng = np.random.default_rng(0)
    direction = jax.tree.map(
        lambda w: rng.normal(size=w.shape).astype(np.float32) * (np.asarray(w) != 0), state.weights
    )
    slope = sum(
        float((g * d).sum())
        for g, d in zip(jax.tree.leaves(state.gradients), jax.tree.leaves(direction), strict=True)
    )
    weights, losses, step = state.weights, [], 2e-3
    for sign in (1, -1):
        moved = jax.tree.map(
            lambda w, d, sign=sign: jax.device_put(np.asarray(w + sign * step * d), w.sharding),
            weights,
            direction,
        )
        state.weights = moved
        losses.append(run(trainer, state, data, name, forward_only=True).metrics["loss:sum"])
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, rel=2e-2, abs=0.3)


def test_gspo_uses_the_ratio_of_the_whole_sequence(trainer):
    state = model(trainer)
    data = random_data([20, 9], loss="gspo")
    output = run(trainer, state, data, "gspo")
    want = 0.0
    for one, lp in zip(data, output.logprobs, strict=True):
        q, A, mask = (
            np.frombuffer(one.inputs[k].data, np.float32)
            for k in ("logprobs", "advantages", "sequence_ratio_mask")
        )
        s = np.exp((lp - q)[mask != 0].mean())
        want -= np.minimum(s * A, np.clip(s, 1 - 3e-4, 1 + 4e-4) * A).sum()
    assert output.metrics["loss:sum"] == pytest.approx(want, rel=1e-3)
    assert np.isfinite(trainer.optim_step(state, ADAM)["grad_norm"])


def test_several_targets_per_token(trainer):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 320, 12)
    targets, weights = rng.integers(0, 320, (12, 3)), rng.normal(size=(12, 3)).astype(np.float32)
    state, separate = model(trainer), model(trainer)
    wide = run(trainer, state, [datum(tokens, target_tokens=targets, weights=weights)])
    assert wide.logprobs[0].shape == (12, 3)
    narrow = run(
        trainer,
        separate,
        [datum(tokens, target_tokens=targets[:, k], weights=weights[:, k]) for k in range(3)],
    )
    np.testing.assert_allclose(wide.logprobs[0], np.stack(narrow.logprobs, axis=1), atol=2e-5)
    assert worst(state.gradients, separate.gradients) < 1e-4


def test_models_that_share_a_batch_are_as_each_alone(tmp_path):
    """Three models of two ranks in one bucket, different losses; and one gradient that overflows."""
    shared = make_trainer(tmp_path, micro_batch_tokens=4 * 4096, max_sequence_length=64)  # several rows
    names = ["cross_entropy", "ppo", "dro"]
    data = [random_data([20, 12, 30], seed, name) for seed, name in enumerate(names)]  # a row of 64 each
    states = [model(shared, seed, rank) for seed, rank in ((1, 4), (2, 6), (3, 8))]
    alone = [model(shared, seed, rank) for seed, rank in ((1, 4), (2, 6), (3, 8))]
    jobs = [shared.job(s, operation(d, n)) for s, d, n in zip(states, data, names, strict=True)]
    assert shared.start(jobs).micro_batches == 1
    outputs = shared.forward_backward(jobs)
    for state, one, name, output in zip(alone, data, names, outputs, strict=True):
        want = run(shared, state, one, name)
        for a, b in zip(output.logprobs, want.logprobs, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)
        assert output.metrics == pytest.approx(want.metrics, rel=1e-4)
    for got, want in zip(states, alone, strict=True):
        assert worst(got.gradients, want.gradients) < 1e-4

    before = [snapshot(state) for state in states]
    overflow = random_data([5], loss="importance_sampling")[0]
    overflow.inputs["logprobs"] = tensor(np.full(5, -1e4, np.float32))
    jobs = [shared.job(states[0], operation([overflow], "importance_sampling")), *jobs[1:]]
    failed, *fine = shared.forward_backward(jobs)
    assert isinstance(failed, NonFiniteError)
    assert same(before[0], states[0])
    for state, output, want in zip(states[1:], fine, alone[1:], strict=True):
        assert output.metrics["loss:sum"] != 0
        assert worst(state.gradients, jax.tree.map(lambda g: 2 * g, want.gradients)) < 1e-4


def test_a_padded_rank_stays_exact(trainer):
    state = model(trainer, rank=3)
    for _ in range(2):
        run(trainer, state, random_data(LENGTHS))
        trainer.optim_step(state, ADAM)
    for pair in [*state.weights["layers"].values(), state.weights["unembed"]]:
        assert (np.asarray(pair["a"])[..., 3:] == 0).all()
        assert (np.asarray(pair["b"])[..., 3:, :] == 0).all()
        assert (np.asarray(pair["b"])[..., :3, :] != 0).all()


def test_no_compilation_over_random_lengths(tmp_path):
    fresh = make_trainer(tmp_path, max_sequence_length=64, micro_batch_tokens=48)
    state = fresh.create(lora(train_mlp=False, train_unembed=False))  # quick to compile
    rng = np.random.default_rng(0)
    for step in range(12):
        lengths = rng.integers(1, 65, rng.integers(1, 9)).tolist()
        run(fresh, state, random_data(lengths, step))
        fresh.optim_step(
            state, AdamParams(learning_rate=10.0 ** -rng.uniform(2, 5), beta1=rng.uniform(0, 0.9))
        )
    assert 5 <= len(fresh.compiled) == len(fresh.programs) <= 8
    fresh.warm_up(state.lora)
    warm = len(fresh.compiled)
    run(fresh, state, random_data([5, 37, 64]))
    assert len(fresh.compiled) == warm <= 8


def test_token_mean_divides_by_the_valid_tokens_of_all_calls(trainer):
    mean, sum_ = model(trainer, grad_normalization="token_mean"), model(trainer)
    data = random_data([10, 6])
    weights = np.array([1, 0, 1, 1, 0, 1, 1, 1, 1, 1], np.float32)
    data[0].inputs["weights"] = tensor(weights)
    for state in (mean, sum_):
        run(trainer, state, data[:1])
        run(trainer, state, data[1:])
    assert mean.valid_tokens == 8 + 6
    norms = [trainer.optim_step(state, ADAM)["grad_norm"] for state in (mean, sum_)]
    assert norms[0] * 14 == pytest.approx(norms[1], rel=1e-5)
    assert mean.valid_tokens == 0


@pytest.mark.parametrize("placeholder", [-100.0, 1e4, -np.inf, np.nan])
def test_masked_tokens_change_neither_gradients_nor_metrics(trainer, placeholder):
    """This holds for every loss. The placeholder stands where a log-prob of about that of the others
    could."""
    for name, loss in REGISTRY.items():
        kept, found = random_data([7], loss="gspo")[0], []
        mask = np.array([0, 0, 1, 1, 0, 1, 1], np.float32)
        advantages = np.array([0, 0, 1, -1, 0, 1, -1], np.float32)
        for value in (-5.7, placeholder):
            inputs = {
                key: np.where(mask == 0, np.float32(value), np.float32(-5.5)).astype(np.float32)
                for key in ("logprobs", "ref_logprobs", "rollout_logprobs")
            }
            inputs |= {"weights": advantages, "advantages": advantages, "sequence_ratio_mask": mask}
            data = [
                msgspec.structs.replace(kept, inputs=kept.inputs | {k: tensor(v) for k, v in inputs.items()})
            ]
            state = model(trainer)
            options = {"beta": 0.3} if "beta" in loss.config else {}
            options |= {"use_tis": True} if "use_tis" in loss.config else {}
            options |= {"compute_kl_stats": True} if "compute_kl_stats" in loss.reports else {}
            output = run(trainer, state, data, name, options)
            found.append((output.metrics, jax.tree.leaves(state.gradients)))
        (metrics, gradients), (also, others) = found
        assert metrics == also, name
        assert all(np.array_equal(a, b) for a, b in zip(gradients, others, strict=True)), name
        assert any(np.abs(gradient).max() > 0 for gradient in gradients)


def test_a_loss_that_is_not_finite_fails_its_own_job_alone(trainer):
    good = random_data(LENGTHS)
    bad = random_data([6, 9], seed=1)
    bad[0].inputs["weights"] = tensor(np.full(6, 3e38, np.float32))
    alone, first, diverged, overflowing = (model(trainer, seed) for seed in (1, 1, 2, 3))
    run(trainer, alone, good)
    diverged.weights = jax.tree.map(
        lambda w: jax.device_put(np.full(w.shape, np.inf, np.float32), w.sharding), diverged.weights
    )
    batch = [(diverged, good), (first, good), (overflowing, bad)]
    results = trainer.forward_backward([trainer.job(state, operation(data)) for state, data in batch])
    assert [isinstance(result, NonFiniteError) for result in results] == [True, False, True]
    assert worst(first.gradients, alone.gradients) < 1e-5
    assert diverged.gradients is None
    assert overflowing.gradients is None
    assert [state.failed_since_step for state in (diverged, first, overflowing)] == [1, 0, 1]


def test_a_loss_that_is_not_finite_leaves_the_state_alone(trainer):
    state = model(trainer)
    run(trainer, state, random_data(LENGTHS))
    before = snapshot(state)
    bad = random_data([5, 5], loss="importance_sampling")
    bad[1].inputs["logprobs"] = tensor(np.full(5, -1e4, np.float32))
    with pytest.raises(NonFiniteError, match="nothing was accumulated"):
        run(trainer, state, bad, "importance_sampling")
    assert same(before, state)
    assert trainer.optim_step(state, ADAM)["grad_norm"] > 0  # a client that skips a bad batch goes on


def test_a_gradient_that_is_not_finite_leaves_the_state_alone(trainer):
    state = model(trainer)
    before = snapshot(state)
    huge = random_data([6])[0]
    huge.inputs["weights"] = tensor(np.array([3e38, -3e38, 3e38, -3e38, 3e38, -3e38], np.float32))
    with pytest.raises(NonFiniteError):
        run(trainer, state, [huge])
    assert same(before, state)
    with pytest.raises(UserError, match="every forward_backward since"):
        trainer.optim_step(state, ADAM)
    assert same(before, state)


def test_a_step_that_is_not_finite_leaves_the_weights_alone(trainer):
    state = model(trainer)
    run(trainer, state, random_data(LENGTHS))
    weights = jax.tree.map(np.array, state.weights)
    with pytest.raises(UserError, match="not finite"):
        trainer.optim_step(state, AdamParams(learning_rate=1e38))
    jax.tree.map(np.testing.assert_array_equal, weights, jax.tree.map(np.array, state.weights))
    run(trainer, state, random_data(LENGTHS))
    assert trainer.optim_step(state, ADAM)["optimizer_step"] == 1


def test_a_state_goes_through_arrays_and_metadata(trainer):
    state = model(trainer)
    run(trainer, state, random_data(LENGTHS))
    trainer.optim_step(state, ADAM)
    run(trainer, state, random_data(LENGTHS))
    abstract = trainer.abstract_arrays(state.lora, has_gradients=True)
    arrays = jax.tree.map(lambda x, a: jax.device_put(np.array(x), a.sharding), state.arrays(), abstract)
    again = TrainingState.from_checkpoint(arrays, state.metadata())
    compiled = len(trainer.compiled)
    for one in (state, again):
        trainer.optim_step(one, ADAM)
    assert same(snapshot(state), again)
    assert again.metadata() == state.metadata()
    assert len(trainer.compiled) == compiled


@pytest.mark.parametrize(
    ("family", "params"),
    [("adamw", AdamParams(learning_rate=1e-2)), ("dimuon", DimuonParams(learning_rate=1e-2))],
)
def test_learning_lowers_the_loss(trainer, family, params):
    for spec in (lora(8), None):
        state = trainer.create(spec, family=family)
        data = random_data([30, 12])
        for one in data:
            one.inputs["weights"] = tensor(np.ones(len(one.tokens) // 4, np.float32))
        losses = []
        for _ in range(8):
            losses.append(run(trainer, state, data).metrics["loss:sum"])
            trainer.optim_step(state, params)
        assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("kind", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_sharded_training_equals_one_device(tmp_path, kind):
    """The test runs in a separate process, with eight virtual devices."""
    script = Path(__file__).with_name("sharded_training.py")
    command = [sys.executable, str(script), str(tmp_path), kind]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
