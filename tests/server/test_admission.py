"""Admission: which tenants have to wait, and which do not."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from tinsmith.engine import messages
from tinsmith.server.access import Quotas
from tinsmith.server.errors import QuotaExceeded, TooManyRequests
from tinsmith.server.models.run import Run
from tinsmith.server.models.submits import BURST_SECONDS, Admission, Queues
from tinsmith.server.operations.operation import Operation
from tinsmith.server.settings import Settings


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def operation(owner: str) -> Operation:
    return Operation(os.urandom(4).hex(), owner, "sample", "", 0, {})


def admission(clock: Clock | None = None, **limits: float) -> Admission:
    return Admission(Quotas(Settings(**limits)), clock or Clock())


@contextmanager
def place(queues: Queues, tenant: str) -> Iterator[list[Operation]]:
    """A place, until it is known which operations were accepted on it."""
    queues.enter(tenant)
    accepted: list[Operation] = []
    try:
        yield accepted
    finally:
        queues.leave(tenant, accepted[0] if accepted else None)


def test_a_tenant_has_so_many_samples_waiting() -> None:
    gate = admission(max_waiting_samples=2)
    first, second = operation("me"), operation("me")
    for each in (first, first, second):  # the same one submitted again counts once
        with place(gate.samples, "me") as accepted:
            accepted.append(each)
    with pytest.raises(TooManyRequests):
        gate.samples.enter("me")
    with place(gate.samples, "you"):
        pass
    first.answer = messages.Failed(first.request_id, "", "user")
    gate.answered(first)
    with place(gate.samples, "me") as accepted, pytest.raises(TooManyRequests):
        gate.samples.enter("me")  # while the one before it is written to the ledger
    with place(gate.samples, "me") as accepted:
        accepted.append(operation("me"))
    with pytest.raises(TooManyRequests):
        gate.samples.enter("me")


def test_operations_that_wait_for_others_leave_them_their_places() -> None:
    gate = admission(max_queued_operations=2)
    for _ in range(2):
        with place(gate.early, "me") as accepted:
            accepted.append(operation("me"))
    with pytest.raises(TooManyRequests, match="queued"):
        gate.early.enter("me")
    with place(gate.operations, "me"):
        pass


def test_operations_from_before_the_start_count() -> None:
    gate = admission(max_waiting_samples=1)
    gate.take_up([operation("me")])
    with pytest.raises(TooManyRequests):
        gate.samples.enter("me")
    with place(gate.samples, "you"):
        pass


def test_the_rate_is_the_tenant_s_own_and_its_polls_tell_why() -> None:
    clock = Clock()
    gate = admission(clock, max_requests_per_second=2.0)
    for _ in range(int(2 * BURST_SECONDS)):
        gate.request("me")
    assert gate.paused("me") is None
    with pytest.raises(TooManyRequests) as refused:
        gate.request("me")
    assert refused.value.headers["Retry-After"] == "1"
    assert "2 requests a second" in (gate.paused("me") or "")
    gate.request("you")
    assert gate.paused("you") is None
    clock.now += 0.5
    gate.request("me")
    clock.now += 31
    assert gate.paused("me") is None


def test_a_bucket_lets_through_what_its_rate_allows() -> None:
    """The definition: at most burst + rate * seconds in any window, and no less than that allows."""
    random = np.random.default_rng(0)
    rate, clock = 0.7, Clock()
    burst = rate * BURST_SECONDS
    gate, taken = admission(clock, max_requests_per_second=rate), []
    for _ in range(2000):
        clock.now += random.exponential(0.7)
        refused: TooManyRequests | None = None
        try:
            gate.request("me")
        except TooManyRequests as error:
            refused = error
        if refused is not None:
            recent = [(clock.now - at, len(taken) - index) for index, at in enumerate(taken)]
            full = max(count - rate * age for age, count in recent)
            assert full + 1 > burst, "refused though there was room"
            assert refused.headers["Retry-After"] == str(math.ceil((full + 1 - burst) / rate))
        else:
            taken.append(clock.now)
    assert 700 < len(taken) < 1990
    for index, start in enumerate(taken):
        for count, end in enumerate(taken[index:], 1):
            assert count <= rate * (end - start) + burst + 1e-9


def test_models_are_named_when_there_are_too_many() -> None:
    quotas = Quotas(Settings(max_models=3))
    quotas.set_own({"me": {"models": 2}})
    gate = Admission(quotas)
    alive = [Run(f"s:train:{n}", "me", "s", "m", {}, {}, {}, "ready", b"", None, 0) for n in range(2)]
    with pytest.raises(QuotaExceeded, match=r"s:train:0 .*s:train:1 "), gate.model("me", "s:train:2", alive):
        pass
    with gate.model("me", "s:train:1", alive), gate.model("you", "t:train:0", alive):
        pass
    with (
        gate.model("me", "s:train:2", alive[:1]),
        pytest.raises(QuotaExceeded),
        gate.model("me", "s:train:3", alive[:1]),
    ):
        pass
    with pytest.raises(TooManyRequests, match="had left"):
        gate.come_back("me", alive)
    gate.come_back("you", alive)


def test_bodies_that_wait_have_a_bounded_number_of_bytes() -> None:
    gate = admission(max_queued_bytes=1000)

    def accept(kind: str, size: int, owner: str = "me", early: bool = False) -> Operation:
        made = operation(owner)
        made.payload_bytes = size
        queues = gate.samples if kind == "sample" else gate.early if early else gate.operations
        for _ in range(2):  # the same one submitted again counts once
            with place(queues, owner) as accepted:
                accepted.append(made)
            if queues[owner].bytes >= 1000:
                break
        return made

    first = accept("sample", 600)
    accept("sample", 600)
    with pytest.raises(TooManyRequests, match="1200 bytes, its quota is 1000"):
        gate.samples.enter("me")
    accept("operation", 5000, early=True)
    accept("operation", 5000)  # those that others wait for find room
    with pytest.raises(TooManyRequests, match="bytes"):
        gate.operations.enter("me")
    accept("sample", 600, "you")
    first.answer = messages.Failed(first.request_id, "", "user")
    gate.answered(first)
    gate.answered(first)
    accept("sample", 600)
