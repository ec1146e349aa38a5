"""The sampler weights on the device: wherever they were before, they sample as one pass of the trainer's
trunk with the same adapter says."""

import threading
import time
from concurrent.futures import Future

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from engine_sampling import (
    full_forward_logprobs,
    load_tiny,
    make_sampler,
    random_adapter,
    request,
    run_all,
    sequences,
)
from tinsmith.ckpt import merged, peft
from tinsmith.engine import messages
from tinsmith.engine.budget import Budget
from tinsmith.engine.deferred_exports import DeferredExports
from tinsmith.engine.errors import UserError
from tinsmith.engine.sampling.sampler_cache import SamplerCache
from tinsmith.engine.sampling.sampler_weights import AdapterStacks, Weights
from tinsmith.engine.training.training_state import TrainingState
from tinsmith.model.sharding import make_mesh

RANK, ALPHA = 8, 16.0
PROMPT = list(range(5, 25))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def adapters(model):
    return {key: random_adapter(model.config, seed, RANK) for seed, key in enumerate("abc")}


@pytest.fixture
def make_cache(model, adapters, tmp_path):
    """A cache over a data directory that holds the adapters a, b and c."""

    def make(**options):
        return SamplerCache(
            lambda: make_sampler(model), model.config, tmp_path, jnp.float32, make_mesh(), **options
        )

    for key, adapter in adapters.items():
        peft.save_adapter(tmp_path / key, adapter, model.config, rank=RANK, alpha=ALPHA, base_model="tiny")
    return make


def check(cache, model, key, adapter):
    """Sample with `key`, and compare with the adapter's own log-probs."""
    asked = request("r", PROMPT, max_tokens=4, temperature=0.0, stop_tokens=[])
    cache.add(msgspec.structs.replace(asked, sampler=messages.SamplerRef("tiny", key)))
    (sampled,) = sequences(run_all(cache.sampler)["r"])
    reference = full_forward_logprobs(model, [*PROMPT, *sampled.tokens], 1.0, adapter, ALPHA / RANK)
    rows = len(PROMPT) - 1 + np.arange(4)
    np.testing.assert_allclose(sampled.logprobs, reference[rows, sampled.tokens], atol=1e-4)


def test_the_least_recently_sampled_make_way_and_come_back(make_cache, model, adapters):
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(adapters["a"]))
    cache = make_cache(bytes_on_device=int(2.5 * size))
    for key in "abac":
        check(cache, model, key, adapters[key])
    assert [key in cache.sampler for key in "abc"] == [True, False, True]
    check(cache, model, "b", adapters["b"])
    assert [key in cache.sampler for key in "abc"] == [False, True, True]


def test_weights_that_are_not_sampled_for_long_leave_the_device(make_cache, model, adapters, monkeypatch):
    skipped, clock = [0.0], time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: clock() + skipped[0])
    cache = make_cache(idle_seconds=600.0)
    assert cache.evict_idle() is None
    for key in "ab":
        check(cache, model, key, adapters[key])
        skipped[0] += 400.0
    assert 100 < cache.evict_idle() < 200, "b has its turn next"
    assert [key in cache.sampler for key in "ab"] == [False, True]
    skipped[0] += 400.0
    assert cache.evict_idle() is None
    assert "b" not in cache.sampler
    check(cache, model, "a", adapters["a"])


def test_frozen_weights_outlive_training_eviction_and_a_failed_sampler_before_they_are_written(
    make_cache, model, adapters
):
    cache = make_cache(bytes_on_device=1)
    weights = jax.tree.map(jnp.array, adapters["a"])
    state = TrainingState(messages.LoraSpec(RANK, ALPHA, 0), weights, optimizer=None)
    cache.freeze("frozen", state)
    for leaf in jax.tree.leaves(weights):
        leaf.delete()  # as a training step does, which takes over the memory
    check(cache, model, "frozen", adapters["a"])
    check(cache, model, "b", adapters["b"])
    assert "frozen" not in cache.sampler
    check(cache, model, "frozen", adapters["a"])
    cache.restart()
    check(cache, model, "frozen", adapters["a"])
    cache.release("frozen")
    with pytest.raises(UserError, match="save them again"):
        check(cache, model, "frozen", adapters["a"])


def test_a_save_waits_for_the_exports_before_it_and_tries_failed_ones_again():
    exports, began, may_end = DeferredExports(), threading.Event(), threading.Event()
    disk = {"full": True, "written": []}

    def slow():
        began.set()
        assert may_end.wait(10)
        disk["written"].append("slow")

    def export():
        if disk["full"]:
            raise OSError("no space left on device")
        disk["written"].append("a")

    saved: Future[int] = Future()
    saved.set_result(7)
    exports.add("b", slow)
    exports.add("a", export)
    assert began.wait(10)
    first, others = exports.after("a", saved), exports.after("b", saved)
    assert not first.done()
    may_end.set()
    with pytest.raises(OSError, match="no space left"):
        first.result(10)
    assert others.result(10) == 7
    assert disk["written"] == ["slow"]
    disk["full"] = False
    assert exports.after("a", saved).result(10) == 7
    assert exports.after("a", saved).result(10) == 7
    assert disk["written"] == ["slow", "a"], "once"
    exports.close()


def test_frozen_weights_that_come_back_are_the_same_arrays(make_cache, model, adapters):
    """And not a second copy beside those that wait to be written."""
    cache = make_cache(bytes_on_device=1)
    state = TrainingState(messages.LoraSpec(RANK, ALPHA, 0), jax.tree.map(jnp.asarray, adapters["a"]), None)
    frozen = cache.freeze("new", state)
    check(cache, model, "b", adapters["b"])  # which has the room alone
    assert "new" not in cache.sampler
    check(cache, model, "new", adapters["a"])
    leaves = [jax.tree.leaves(weights.adapter) for weights in (frozen, cache.sampler.weights_of("new"))]
    assert all(one is other for one, other in zip(*leaves, strict=True))


def test_stacks_of_adapters_are_bounded_in_bytes(model):
    weights = [Weights(model.base, None, random_adapter(model.config, seed, RANK), 1.0) for seed in range(6)]
    stacks = AdapterStacks(model.config, Budget(1 << 28))
    stacks.of(weights[:2])
    size = stacks.bytes
    stacks = AdapterStacks(model.config, Budget(2 * size))
    for first in range(5):
        pair = weights[first : first + 2]
        stack, rows = stacks.of(pair)
        assert rows == [0, 1]
        assert stacks.bytes <= 2 * size
        assert stacks.of(pair)[0] is stack
    small = AdapterStacks(model.config, Budget(0))
    stack, _ = small.of(weights[:2])
    assert small.of(weights[:2])[0] is stack, "the one in use is kept"


def nbytes(*adapters):
    return sum(leaf.nbytes for adapter in adapters for leaf in jax.tree.leaves(adapter))


def training(adapter, alpha=ALPHA):
    return TrainingState(messages.LoraSpec(RANK, alpha, 0), jax.tree.map(jnp.array, adapter), None)


def test_a_model_frozen_twice_at_one_step_is_one_copy(make_cache, model, adapters):
    cache = make_cache()
    state = training(adapters["a"])
    cache.freeze("one", state)
    cache.freeze("other", state)
    assert cache.bytes == nbytes(adapters["a"])
    state.weights = jax.tree.map(jnp.array, adapters["b"])  # as a step does
    cache.freeze("next", state)
    assert cache.bytes == nbytes(adapters["a"], adapters["b"])
    for key, adapter in (("one", "a"), ("other", "a"), ("next", "b"), ("one", "a")):
        check(cache, model, key, adapters[adapter])
    cache.release("one")
    check(cache, model, "other", adapters["a"])
    assert cache.bytes == nbytes(adapters["a"], adapters["b"])


@pytest.mark.parametrize("order", ["new first", "named first"])
def test_named_and_unnamed_saves_of_equal_weights_are_one_copy(make_cache, model, adapters, tmp_path, order):
    for name in ("copy", "same"):
        peft.save_adapter(
            tmp_path / name, adapters["a"], model.config, rank=RANK, alpha=ALPHA, base_model="t"
        )
    cache = make_cache(bytes_on_device=int(1.5 * nbytes(adapters["a"])))
    cache.freeze("new", training(adapters["a"]))
    keys = ["new", "copy", "same", "a"] if order == "new first" else ["copy", "new", "a", "same"]
    for key in keys:
        check(cache, model, key, adapters["a"])
    assert all(key in cache.sampler for key in keys), "together they take as much room as one"
    assert cache.bytes == nbytes(adapters["a"])
    check(cache, model, "b", adapters["b"])
    assert cache.bytes == nbytes(adapters["b"])
    check(cache, model, "new", adapters["a"])


def test_weights_that_differ_in_one_bit_or_in_their_scale_are_two(make_cache, model, adapters, tmp_path):
    leaves, structure = jax.tree.flatten(adapters["a"])
    largest = max(range(len(leaves)), key=lambda place: leaves[place].nbytes)
    changed = np.array(leaves[largest])
    place = np.unravel_index(int(np.argmax(changed)), changed.shape)
    changed[place] = np.nextafter(changed[place], np.float32(np.inf))
    leaves[largest] = changed
    other = jax.tree.unflatten(structure, leaves)
    peft.save_adapter(tmp_path / "bit", other, model.config, rank=RANK, alpha=ALPHA, base_model="tiny")
    peft.save_adapter(
        tmp_path / "scale", adapters["a"], model.config, rank=RANK, alpha=2 * ALPHA, base_model="tiny"
    )
    cache = make_cache()
    for key in ("a", "bit"):
        check(cache, model, key, adapters["a"])
    cache._require("scale")
    assert cache.sampler.weights_of("scale").scale == 2 * ALPHA / RANK
    assert cache.bytes == 3 * nbytes(adapters["a"])
    np.testing.assert_array_equal(
        np.asarray(jax.tree.leaves(cache.sampler.weights_of("bit").own)[largest])[place], changed[place]
    )


def test_weights_that_share_arrays_are_parked_and_come_back_as_one(make_cache, model, adapters):
    cache = make_cache()
    state = training(adapters["a"])
    for key in ("one", "other"):
        cache.freeze(key, state)
    cache.park()
    cache.unpark()
    for key in ("one", "other"):
        check(cache, model, key, adapters["a"])
    assert cache.bytes == nbytes(adapters["a"])


def test_equal_full_weights_are_one_copy(make_cache, model, tmp_path):
    cache = make_cache()
    cache.freeze("new", TrainingState(None, jax.tree.map(jnp.array, model.base), None))
    merged.save_merged(
        tmp_path / "full", merged.in_memory(model.base), model.config, base_folder=model.folder
    )
    for key in ("new", "full"):
        check(cache, model, key, None)
    assert cache.bytes == nbytes(model.base)
    weights = [cache.sampler.weights_of(key) for key in ("new", "full")]
    decoded = [jax.tree.leaves(each.base_by_layer) for each in weights]
    assert all(one is other for one, other in zip(*decoded, strict=True)), "also the copies for decoding"
