"""Sequence numbers and resubmissions, on the bare wire."""

from __future__ import annotations

import concurrent.futures
import time

import pytest
from conformance.server_process import Wire


def test_a_resubmission_finds_the_first(wire: Wire) -> None:
    model = wire.model()
    first = wire.forward_backward(model, 1).json()
    assert wire.forward_backward(model, 1).json() == first
    steps = [wire.optim_step(model, 2, learning_rate=0.0).json() for _ in range(3)]
    assert steps[0] == steps[1] == steps[2]
    assert "error" not in wire.result(wire.optim_step(model, 2))
    # Had the step been taken again, it would have found no gradients and failed.
    assert wire.forward_backward(model, 1).json() == first


def test_the_same_submit_many_times_at_once(wire: Wire) -> None:
    model = wire.model()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: wire.forward_backward(model, 1).json()["request_id"], range(16)))
    assert len(set(answers)) == 1


def test_create_model_is_idempotent(wire: Wire) -> None:
    session = wire.session()
    body = {"session_id": session, "model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 4}}
    first, second = wire.post("create_model", **body).json(), wire.post("create_model", **body).json()
    assert first == second
    assert first["model_id"] == f"{session}:train:0"


def test_samples_keep_their_ids(wire: Wire) -> None:
    session = wire.session()
    created = [
        wire.post(
            "create_sampling_session", session_id=session, sampling_session_seq_id=0, base_model="tiny"
        ).json()
        for _ in range(2)
    ]
    assert created[0] == created[1]
    body = {
        "sampling_session_id": created[0]["sampling_session_id"],
        "seq_id": 10**18 + 1,
        "num_samples": 3,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [5, 6]}]},
        "sampling_params": {"max_tokens": 2},
    }
    first, second = wire.post("asample", **body).json(), wire.post("asample", **body).json()
    assert first == second
    assert len(set(first["sample_sequence_ids"])) == 3


def test_operations_run_in_order_however_they_arrive(wire: Wire) -> None:
    """A step is only good between the gradients before it and after it."""
    model = wire.model()
    submits = {
        4: lambda: wire.optim_step(model, 4),
        2: lambda: wire.optim_step(model, 2),
        3: lambda: wire.forward_backward(model, 3),
        1: lambda: wire.forward_backward(model, 1),
    }
    answers = {number: submit() for number, submit in submits.items()}
    results = {number: wire.result(answers[number]) for number in sorted(answers)}
    assert not any("error" in result for result in results.values()), results
    # The second forward_backward saw the weights of the first step.
    assert results[3]["metrics"]["loss:sum"] < results[1]["metrics"]["loss:sum"]


def test_a_gap_is_waited_for_and_then_failed(wire: Wire) -> None:
    model = wire.model()
    early = wire.forward_backward(model, 2)
    assert wire.poll(early.json()["request_id"]).status_code in (200, 408)
    failed = wire.result(early)
    assert failed["category"] == "user"
    assert "seq_id 1" in failed["error"]
    # The number that was given up is refused now, and the next one runs.
    assert wire.forward_backward(model, 1).status_code == 400
    assert "error" not in wire.result(wire.forward_backward(model, 3))


def test_a_refused_submit_uses_up_its_number(wire: Wire) -> None:
    model = wire.model()
    refused = wire.forward_backward(model, 1, datums=[])
    assert refused.status_code == 400
    assert wire.forward_backward(model, 1).status_code == 400, "the first answer stays"
    truncated = wire.post_protobuf(
        b"\x0a" + bytes([len(model)]) + model.encode() + b"\x10\x02" + b"\x1a\xff\x01cut off"
    )
    assert truncated.status_code == 400
    assert wire.optim_step(model, 3, learning_rate="fast").status_code == 422
    started = time.monotonic()
    assert "error" not in wire.result(wire.forward_backward(model, 4))
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("body", [{}, {"request_id": "req_0000"}, {"request_id": ""}])
def test_polls_of_unknown_requests(wire: Wire, body: dict) -> None:
    """Never 404: a client would take it for the end of something that may exist."""
    assert wire.post("retrieve_future", **body).status_code == (410 if body else 422)
