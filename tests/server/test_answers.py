"""Answers that are kept in memory: the newest of them, so many bytes."""

from __future__ import annotations

import pytest
from tinsmith.engine import messages
from tinsmith.server.operations.operation import KnownOperations, Operation

MAX_BYTES = 100_000


def answered(number: int, logprobs: int) -> Operation:
    tensor = messages.Tensor("float32", (logprobs,), bytes(4 * logprobs))
    output = messages.ForwardBackwardOutput([tensor], {})
    answer = messages.Done(f"r{number}", output)
    return Operation(f"r{number}", "owner", "forward_backward", "m", number, {}, None, answer)


def add(answers: KnownOperations, operation: Operation) -> None:
    answers.answered(operation, len(messages.encode(operation.answer)))


def remembered(answers: KnownOperations, count: int) -> list[int]:
    return [number for number in range(count) if answers.get(f"r{number}") is not None]


def test_the_newest_answers_stay_and_take_no_more_than_their_bytes() -> None:
    answers = KnownOperations(MAX_BYTES)
    for number in range(100):
        add(answers, answered(number, 2000))
    kept = remembered(answers, 100)
    assert kept == list(range(100 - len(kept), 100))
    assert MAX_BYTES / 2 < 8000 * len(kept) < MAX_BYTES


def test_small_answers_are_bounded_too() -> None:
    answers = KnownOperations(MAX_BYTES)
    for number in range(1000):
        add(answers, answered(number, 0))
    assert 10 < len(remembered(answers, 1000)) < 100


def test_an_answer_that_is_added_again_counts_once() -> None:
    answers = KnownOperations(MAX_BYTES)
    add(answers, answered(0, 10))
    for _ in range(100):
        add(answers, answered(1, 10_000))
    assert remembered(answers, 2) == [0, 1]


def test_a_tenant_with_many_answers_pushes_out_its_own() -> None:
    answers = KnownOperations(MAX_BYTES)
    small = answered(0, 100)
    small.owner = "other"
    add(answers, small)
    for number in range(1, 100):
        add(answers, answered(number, 2000))
    assert answers.get("r0") is small
    assert len(remembered(answers, 100)) > 5
    answers.forget_answered("owner")
    assert remembered(answers, 100) == [0]


TOPK = messages.TopK(bytes(45_000), bytes(45_000), 20, 100)


@pytest.mark.parametrize(
    "output",
    [
        messages.SampleOutput([messages.SampledSequence(b"", bytes(90_000), "length")]),
        messages.SampleOutput(
            [
                messages.SampledSequence(
                    b"", b"", "length", messages.TopK(bytes(45_000), bytes(45_000), 20, 100)
                )
            ]
        ),
        messages.SampleOutput([], prompt_logprobs=bytes(90_000)),
        messages.SampleOutput([], topk_prompt_logprobs=TOPK),
        messages.ForwardBackwardOutput([], {"x" * 90_000: 1.0}),
    ],
)
def test_all_that_an_answer_has_is_counted(output: object) -> None:
    """Log-probs, likely tokens and scores of prompts as well as tokens."""
    answers = KnownOperations(MAX_BYTES)
    for number in range(3):
        big = answered(number, 0)
        big.answer = messages.Done(f"r{number}", output)
        add(answers, big)
    assert remembered(answers, 3) == [2]
    failed = answered(3, 0)
    failed.answer = messages.Failed("r3", "x" * 90_000, "user")
    add(answers, failed)
    assert remembered(answers, 4) == [3]
