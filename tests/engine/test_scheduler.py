"""Scheduling as a client could notice it: order within a model, turns between models, shared batches."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from tinsmith.engine import messages
from tinsmith.engine.scheduler import Scheduler, batch_tokens

BATCH_TOKENS = 100


def forward_backward(request_id, model_id, tokens):
    return messages.ForwardBackward(
        request_id=request_id,
        model_id=model_id,
        data=[messages.Datum(tokens=bytes(4 * tokens), inputs={})],
        loss_fn="cross_entropy",
    )


def optim_step(request_id, model_id):
    return messages.OptimStep(request_id=request_id, model_id=model_id, params=messages.AdamParams())


def batch_key(operation):
    """Models of equal first letter share batches."""
    return operation.model_id[0] if isinstance(operation, messages.ForwardBackward) else None


def new_scheduler():
    return Scheduler(batch_key, BATCH_TOKENS)


models = st.sampled_from(["a0", "a1", "a2", "b0"])
arrivals = st.lists(st.tuples(models, st.one_of(st.none(), st.integers(1, 150))), max_size=40)


def operations_of(arrivals):
    return [
        optim_step(f"r{i}", model) if tokens is None else forward_backward(f"r{i}", model, tokens)
        for i, (model, tokens) in enumerate(arrivals)
    ]


def turns(operation):
    """Return the number of turns that an operation takes: a micro-batch holds 50 tokens."""
    return max(1, -(-batch_tokens(operation) // 50))


@given(arrivals, st.randoms(use_true_random=False))
def test_every_operation_runs_once_and_in_its_models_order(arrivals, random):
    scheduler, waiting = new_scheduler(), operations_of(arrivals)
    expected = {m: [op.request_id for op in waiting if op.model_id == m] for m, _ in arrivals}
    ran, turns_left = {m: [] for m in expected}, {}
    while waiting or scheduler:
        for _ in range(random.randint(0, 3)):
            if waiting:
                scheduler.add(waiting.pop(0))
        unit = scheduler.next()
        assert (unit is None) == (not scheduler)
        if unit is None:
            continue
        assert len({batch_key(op) for op in unit.operations}) == 1
        if len(unit.operations) > 1:
            assert batch_key(unit.operations[0]) is not None
            assert sum(map(batch_tokens, unit.operations)) <= BATCH_TOKENS
        turns_left.setdefault(id(unit), sum(map(turns, unit.operations)))
        turns_left[id(unit)] -= 1
        if turns_left[id(unit)] == 0:
            del turns_left[id(unit)]
            for operation in list(unit.operations):
                ran[operation.model_id].append(operation.request_id)
                scheduler.finish(operation)
    assert ran == expected


@given(arrivals)
def test_no_model_waits_for_more_than_one_turn_of_each_other(arrivals):
    scheduler = new_scheduler()
    for operation in operations_of(arrivals):
        scheduler.add(operation)
    waited, left = Counter(), {}
    while scheduler:
        waiting = {model for model, queue in scheduler._queues.items() if queue}
        unit = scheduler.next()
        served = {operation.model_id for operation in unit.operations}
        for model in waiting - served:
            waited[model] += 1
            assert waited[model] < 4  # of four models
        for model in served:
            waited[model] = 0
        left.setdefault(id(unit), sum(map(turns, unit.operations)))
        left[id(unit)] -= 1
        if left[id(unit)] == 0:
            del left[id(unit)]
            for operation in list(unit.operations):
                scheduler.finish(operation)


@given(arrivals, st.data())
def test_a_cancelled_operation_never_ends_and_the_others_do(arrivals, data):
    scheduler, operations = new_scheduler(), operations_of(arrivals)
    for operation in operations:
        scheduler.add(operation)
    began = scheduler.next()
    if began:
        began.progress = iter([None])
    chosen = [operation for operation in operations if data.draw(st.booleans())]
    for operation in chosen:
        in_began = operation in began.operations
        assert scheduler.cancel(operation.request_id) is operation
        assert scheduler.cancel(operation.request_id) is None
        if in_began:
            assert began.progress is None
    ran = []
    while scheduler:
        for operation in list(scheduler.next().operations):
            ran.append(operation)
            scheduler.finish(operation)
    assert Counter(op.request_id for op in ran) == Counter(
        op.request_id for op in operations if op not in chosen
    )


def test_small_batches_of_several_models_share_the_device_and_steps_do_not():
    scheduler = new_scheduler()
    operations = [
        forward_backward("1", "a0", 30),
        forward_backward("2", "a0", 30),
        optim_step("3", "a0"),
        forward_backward("4", "a1", 30),
        forward_backward("5", "b0", 30),
        forward_backward("6", "a2", 20),
    ]
    for operation in operations:
        scheduler.add(operation)
    unit = scheduler.next()
    assert [operation.request_id for operation in unit.operations] == ["1", "4", "6"]
    assert scheduler.next() is unit  # a1's turn
    assert [operation.request_id for operation in scheduler.next().operations] == ["5"]


def test_a_long_operation_takes_turns_with_others():
    scheduler = new_scheduler()
    scheduler.add(forward_backward("long", "a0", 100_000))
    scheduler.add(forward_backward("short", "a1", 10))
    long = scheduler.next()
    short = scheduler.next()
    assert [operation.request_id for operation in short.operations] == ["short"]
    scheduler.finish(short.operations[0])
    assert scheduler.next() is long
