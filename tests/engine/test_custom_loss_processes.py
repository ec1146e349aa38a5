"""A custom loss that takes long: stopped after its seconds, at the cost of its owner alone."""

import json
import time

import jax
import numpy as np
import pytest
from engine_training import datum, lora, make_trainer, run, with_random_b, worst
from tinsmith.engine import messages
from tinsmith.engine.errors import UserError
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


SORTED = [
    *table(1 << 20),
    call("sorted", "torch.argsort", {"ref": "table"}),
    call("last", "float", {"ref": "sorted"}, op="call_method"),
]
DATA = [datum([5, 6, 7, 8], target_tokens=[6, 7, 8, 9])]


def custom(trainer, state, which):
    made = messages.ForwardBackward("request", "model", DATA, "custom", {}, custom_loss=which)
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


def test_what_is_cancelled_leaves_its_place_to_others(trainer):
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
def test_what_would_take_too_long_is_refused_before_it_is_computed(trainer, size, last):
    state = trainer.create(lora())
    (result,) = trainer.forward_backward([custom(trainer, state, loss(*table(size), *last))])
    assert isinstance(result, UserError)
    assert "floating point operations for one datum" in str(result)
