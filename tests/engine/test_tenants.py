"""Models in training share one budget with samplers: those used last stay on the device, all train alike."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from engine_training import lora, make_trainer, operation, random_data, with_random_b
from tinsmith.engine.budget import Budget
from tinsmith.engine.messages import AdamParams
from tinsmith.engine.tenants import Tenants
from tinsmith.engine.training.recycled import RecycledTrees

LENGTHS = [9, 30, 3]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return make_trainer(folder, max_sequence_length=128, micro_batch_tokens=64)


def states(trainer):
    return [with_random_b(trainer.create(lora(4, seed=seed)), seed) for seed in (1, 2, 3)]


def size_of(state):
    return sum(leaf.nbytes for leaf in jax.tree.leaves((state.weights, state.optimizer, state.gradients)))


def step(trainer, state, seed):
    (result,) = trainer.forward_backward([trainer.job(state, operation(random_data(LENGTHS, seed)))])
    assert not isinstance(result, Exception), result
    trainer.optim_step(state, AdamParams(learning_rate=1e-2))


def tenants_of(trainer, budget, running=(), may_leave=True):
    tenants = Tenants(budget, lambda model_id: model_id in running, may_leave)
    for name, state in zip("abc", states(trainer), strict=True):
        tenants.add(name, SimpleNamespace(trainer=trainer), state)
    return tenants


def where(tenants):
    return {name: tenants.peek(name).parked is None for name in "abc"}


def test_models_that_wait_in_the_host_s_memory_train_to_the_same_bits(trainer):
    budget = Budget(int(2.2 * size_of(states(trainer)[0])))
    tenants = tenants_of(trainer, budget)
    assert where(tenants) == {"a": False, "b": True, "c": True}
    assert tenants.bytes <= budget.max_bytes
    assert tenants.bytes_waiting > 0
    expected = states(trainer)
    for turn in range(3):
        for seed, (name, reference) in enumerate(zip("abc", expected, strict=True)):
            step(trainer, tenants.use(name).state, 10 * turn + seed)
            step(trainer, reference, 10 * turn + seed)
            assert tenants.bytes <= budget.max_bytes
    for name, reference in zip("abc", expected, strict=True):
        state = tenants.use(name).state
        for one, other in zip(
            jax.tree.leaves((state.weights, state.optimizer)),
            jax.tree.leaves((reference.weights, reference.optimizer)),
            strict=True,
        ):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_gradients_wait_with_their_model(trainer):
    budget = Budget(1)
    tenants = tenants_of(trainer, budget)
    state = tenants.use("a").state
    trainer.forward_backward([trainer.job(state, operation(random_data(LENGTHS)))])
    before = jax.tree.map(np.array, state.gradients)
    tenants.use("b")
    budget.make_room(0)
    assert where(tenants)["a"] is False
    assert state.gradients is None
    jax.tree.map(np.testing.assert_array_equal, before, tenants.use("a").state.gradients)


def test_a_model_that_has_a_turn_and_models_on_a_cpu_stay(trainer):
    assert where(tenants_of(trainer, Budget(1), running="ab")) == {"a": True, "b": True, "c": False}
    assert where(tenants_of(trainer, Budget(1), may_leave=False)) == dict.fromkeys("abc", True)


def test_models_that_never_leave_crowd_nothing_out(trainer):
    """This is a CPU's case: samplers' weights and recycled zeros stay however many models are trained."""
    budget = Budget(1 << 20)
    zeros = RecycledTrees(budget)
    zeros.put("s", {"x": jax.numpy.zeros(1000)})
    tenants = tenants_of(trainer, budget, may_leave=False)
    assert tenants.bytes > 0
    budget.max_bytes = 8000
    zeros.put("t", {"x": jax.numpy.zeros(1000)})
    assert zeros.take("s") is not None
    assert budget.by_kind()["tenants"] == tenants.bytes


def test_whatever_was_used_least_recently_gives_way_over_all_kinds(trainer):
    budget = Budget(1 << 30)
    tenants = tenants_of(trainer, budget)
    zeros = RecycledTrees(budget)
    one = jax.tree.map(jax.numpy.zeros_like, tenants.peek("a").state.weights)
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(one))
    zeros.put("s", one)
    tenants.use("a")
    assert budget.by_kind() == {"tenants": tenants.bytes, "zeros": nbytes}
    budget.give_up(1)
    assert where(tenants) == {"a": True, "b": False, "c": True}
    budget.give_up(tenants.peek("c").bytes + nbytes)
    assert where(tenants) == {"a": True, "b": False, "c": False}
    assert zeros.take("s") is None
