"""A custom loss that takes long: stopped after its seconds, at the cost of its owner alone."""

import json
import time

import jax
import numpy as np
import pytest
from engine_training import datum, lora, make_trainer, run, with_random_b, worst
from tinsmith.engine import messages
from tinsmith.engine.errors import UserError
from tinsmith.engine.training import custom_loss_processes, custom_losses
from tinsmith.engine.training.custom_loss_processes import CustomLossProcesses

REF = {"ref": "logprobs"}


def call(name, target, *args, op="call_function"):
    return {"op": op, "name": name, "target": target, "args": list(args)}


def loss(*nodes) -> messages.CustomLoss:
    """The sum of the log-probs and of the last node's values."""
    first = {"op": "placeholder", "name": "logprobs", "target": "logprobs"}
    whole = [first, call("total", "sum", REF, op="call_method"), *nodes]
    last = "total"
    if nodes:
        whole += [
            call("rest", "sum", {"ref": nodes[-1]["name"]}, op="call_method"),
            call("both", "torch.add", {"ref": "total"}, {"ref": "rest"}),
        ]
        last = "both"
    output = call("output", "output", [{"ref": last}, {"dict": {}}], op="output")
    return messages.CustomLoss(
        "slow", [("logprobs", 1)], json.dumps({"format": 1, "nodes": [*whole, output]}).encode()
    )


def table(size):
    """Many values, all of which depend on the log-probs."""
    return [
        call("range", "torch.arange", size),
        call("sines", "torch.sin", {"ref": "range"}),
        call("table", "torch.mul", {"ref": "sines"}, {"ref": "total"}),
    ]


def sorting(size):
    return [
        *table(size),
        call("sorted", "torch.argsort", {"ref": "table"}),
        call("last", "float", {"ref": "sorted"}, op="call_method"),
    ]


SORTED = sorting(1 << 20)  # takes a second or so
DATA = [datum([5, 6, 7, 8], target_tokens=[6, 7, 8, 9])]


def custom(trainer, state, which, owner="", datums=1):
    made = messages.ForwardBackward(
        "request", "model", DATA * datums, "custom", {}, custom_loss=which, owner=owner
    )
    return trainer.job(state, made)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return make_trainer(tmp_path_factory.mktemp("model"))


def test_a_loss_is_stopped_after_its_seconds_while_others_train(trainer):
    slow, other = (with_random_b(trainer.create(lora(seed=seed)), seed) for seed in (1, 2))
    ones = [datum([5, 6, 7, 8], target_tokens=[6, 7, 8, 9], weights=np.ones(4, np.float32))]
    run(trainer, other, ones)
    trainer.custom_loss_processes = CustomLossProcesses(datum_seconds=60.0)
    (first,) = trainer.forward_backward([custom(trainer, slow, loss())])
    assert first.metrics["loss:sum"] == pytest.approx(float(first.logprobs[0].sum()), rel=1e-5)
    kept = jax.tree.map(np.array, slow.gradients)
    reference = with_random_b(trainer.create(lora(seed=1)), 1)
    minus = [datum([5, 6, 7, 8], target_tokens=[6, 7, 8, 9], weights=-np.ones(4, np.float32))]
    run(trainer, reference, minus)
    assert worst(kept, reference.gradients) < 1e-5

    trainer.custom_loss_processes.datum_seconds = 0.5
    under_way = trainer.start([custom(trainer, slow, loss(*SORTED))])
    turns, steps, began = [], 0, time.monotonic()
    while True:
        turn = time.monotonic()
        if under_way.step():
            break
        turns.append(time.monotonic() - turn)
        run(trainer, other, ones)
        steps += 1
    assert time.monotonic() - began < 20
    (result,) = under_way.results
    assert isinstance(result, UserError)
    assert "datum 0: custom loss 'slow': stopped after 0.5 s" in str(result)
    assert under_way.seconds_beside >= 0.5
    assert steps > 3
    assert np.median(turns) < 0.1
    assert worst(slow.gradients, kept) == 0
    assert slow.failed_since_step == 1

    trainer.custom_loss_processes.datum_seconds = 60.0
    (again,) = trainer.forward_backward([custom(trainer, slow, loss())])
    assert again.metrics["loss:sum"] == pytest.approx(first.metrics["loss:sum"], rel=1e-5)


def finish(under_way, *others):
    """Step a run to its end, and others meanwhile. Return the seconds it took; none of the others may end."""
    began = time.monotonic()
    while not under_way.step():
        for other in others:
            assert not other.step()
    (result,) = under_way.results
    assert not isinstance(result, Exception), result
    return time.monotonic() - began


def slow_datum_seconds(trainer, state):
    """Seconds of one datum of the slow loss, without compilation."""
    slow = custom(trainer, state, loss(*sorting(1 << 19)))
    trainer.forward_backward([slow])
    return finish(trainer.start([slow]))


def test_slow_losses_of_two_tenants_do_not_delay_a_third_one_s(trainer):
    """A third owner's loss takes less time than one datum of theirs, of which each has many."""
    states = [trainer.create(lora(seed=seed)) for seed in range(3)]
    trainer.custom_loss_processes = CustomLossProcesses(datum_seconds=60.0)
    one_datum = slow_datum_seconds(trainer, states[0])
    finish(trainer.start([custom(trainer, states[2], loss(), "c")]))
    slow = [
        trainer.start([custom(trainer, state, loss(*sorting(1 << 19)), owner, datums=30)])
        for state, owner in zip(states[:2], "ab", strict=True)
    ]
    finish(trainer.start([custom(trainer, states[2], loss(), "c")]), *slow)  # has its process now
    while min(each.seconds_beside for each in slow) < 2 * one_datum:
        assert [each.step() for each in slow] == [False, False]
    times = [finish(trainer.start([custom(trainer, states[2], loss(), "c")]), *slow) for _ in range(5)]
    for each in slow:
        each.close()
    assert np.median(times) < one_datum / 2


def test_a_tenant_with_little_use_takes_the_place_of_one_with_much(trainer, monkeypatch):
    """There are two processes and two owners with slow losses, whose results do not change."""
    started = []

    class Counted(custom_loss_processes.CustomLossProcess):
        def __init__(self):
            super().__init__()
            started.append(self)

    monkeypatch.setattr(custom_loss_processes, "CustomLossProcess", Counted)
    monkeypatch.setattr(custom_loss_processes, "_MUCH_SECONDS", 0.1)
    states = [with_random_b(trainer.create(lora(seed=seed)), seed) for seed in range(3)]
    trainer.custom_loss_processes = CustomLossProcesses(datum_seconds=60.0, processes=2, running=1)
    slow = [
        custom(trainer, state, loss(*SORTED), owner) for state, owner in zip(states[:2], "ab", strict=True)
    ]
    expected = [trainer.start([job]) for job in slow]
    while not all([each.step() for each in expected]):  # noqa: C419 (all of them are stepped)
        pass
    under_way = [trainer.start([job]) for job in slow]
    for _ in range(10):
        assert [each.step() for each in under_way] == [False, False]
    third = trainer.start([custom(trainer, states[2], loss(), "c")])
    for _ in range(5):
        assert not third.step()
    assert len(started) == 3, "one of the two has ended, and one for the third owner is starting"
    for each, of_first in zip(under_way, expected, strict=True):
        finish(each)
        assert each.results[0].metrics == of_first.results[0].metrics
    finish(third)


def test_a_cancelled_loss_leaves_its_place_to_others(trainer):
    state = trainer.create(lora())
    trainer.custom_loss_processes = CustomLossProcesses(datum_seconds=60.0)
    for _ in range(3):
        under_way = trainer.start([custom(trainer, state, loss(*SORTED))])
        for _ in range(5):
            assert not under_way.step()
        under_way.close()
    (result,) = trainer.forward_backward([custom(trainer, state, loss())])
    assert not isinstance(result, Exception)


@pytest.mark.parametrize(
    ("size", "last"),
    [
        (1 << 22, [call("last", "torch.argsort", {"ref": "table"})]),
        (
            1 << 23,
            [
                call("pair", "torch.topk", {"ref": "table"}, 5),
                call("last", "operator.getitem", {"ref": "pair"}, 0),
            ],
        ),
    ],
    ids=["sort", "topk"],
)
def test_a_loss_that_would_take_too_long_is_refused_before_it_is_computed(trainer, size, last):
    state = trainer.create(lora())
    (result,) = trainer.forward_backward([custom(trainer, state, loss(*table(size), *last))])
    assert isinstance(result, UserError)
    assert "floating point operations for one datum" in str(result)


def test_a_loss_that_needs_too_much_memory_is_refused(monkeypatch):
    monkeypatch.setattr(custom_losses, "MAX_BYTES", 1 << 20)
    values = np.zeros(4, np.float32)
    small, large = (
        loss(*table(size), call("last", "torch.argsort", {"ref": "table"})) for size in (10, 1 << 17)
    )
    custom_losses.CustomLosses().differentiate(small, values, {})
    with pytest.raises(UserError, match=r"its intermediate values take .* GiB for one datum"):
        custom_losses.CustomLosses().differentiate(large, values, {})


def test_the_compiler_does_not_compute_a_long_scan_of_constants(trainer):
    """XLA would take minutes for the gradient, a cumulative sum of ones."""
    state = trainer.create(lora())
    trainer.custom_loss_processes = CustomLossProcesses()
    scan = loss(*table(1 << 20), call("last", "torch.cumsum", {"ref": "table"}, 0))
    (result,) = trainer.forward_backward([custom(trainer, state, scan)])
    assert not isinstance(result, Exception)
