"""Usage: operations are counted, and counted once."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from engineless import DAY, MODEL, Server, model
from sqlalchemy import Connection, text
from sqlalchemy.dialects import postgresql
from tinsmith.engine import messages
from tinsmith.server.cli import app
from tinsmith.server.ledger import accounts, operations, tenancy
from tinsmith.server.operations.operation import Operation, Submission, natural_key
from typer.testing import CliRunner

SAMPLER = "s:sample:3"


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    started = Server(tmp_path, audit_seconds=3 * DAY, usage_seconds=3 * DAY)
    await started.ledger.write(model)
    started.runs._dispatcher.open(MODEL, 1)
    yield started
    started.ledger.close()


def gradients(number: int) -> Submission:
    return Submission(
        "me",
        "forward_backward",
        natural_key(MODEL, number),
        lambda request_id: messages.ForwardBackward(request_id, MODEL, [], "cross_entropy"),
        model_id=MODEL,
    )


def sample(number: int) -> Submission:
    ref = messages.SamplerRef("tiny", f"checkpoints/{MODEL.replace(':', '@')}/sampler_weights/a-0")
    return Submission(
        "me",
        "sample",
        f"sample/{SAMPLER}/{number}",
        lambda request_id: messages.Sample(request_id, ref, bytes(4 * 7), 2, messages.SamplingParams()),
        session_id="s",
    )


def passed(operation: Operation, *shapes: tuple[int, ...]) -> messages.Done:
    tensors = [messages.Tensor("float32", shape, b"") for shape in shapes]
    return messages.Done(operation.request_id, messages.ForwardBackwardOutput(tensors, {}))


def sampled(operation: Operation) -> messages.Done:
    sequences = [messages.SampledSequence(bytes(4 * n), bytes(4 * n), "length") for n in (3, 2)]
    return messages.Done(operation.request_id, messages.SampleOutput(sequences, prompt_cache_hit_tokens=4))


async def finish(server: Server, operation: Operation, answer: Any) -> None:
    server.operations.on_answer(answer)
    await operation.finished.wait()


async def counted(server: Server) -> list[tuple]:
    """Session, run, base model and the counters; all of it in this hour or the one before."""
    hour = int(time.time()) // 3600
    rows = await server.ledger.read(
        lambda connection: accounts.usage_between(connection, "me", hour - 1, hour + 1)
    )
    counters = [tuple(getattr(row, name) for name in accounts.COUNTERS) for row in rows]
    return sorted(
        (row.session_id, row.run_id, row.base_model, *counts)
        for row, counts in zip(rows, counters, strict=True)
    )


async def test_tokens_of_each_kind_are_added_up(server: Server) -> None:
    for number in (1, 2):
        operation = await server.operations.accept(gradients(number))
        await finish(server, operation, passed(operation, (3,), (5, 2)))
        operation = await server.operations.accept(sample(number))
        await finish(server, operation, sampled(operation))
    assert await counted(server) == [("s", MODEL, "tiny", 16, 6, 8, 10, 0)]


async def test_the_operator_sees_what_each_tenant_has_used(server: Server) -> None:
    operation = await server.operations.accept(gradients(1))
    await finish(server, operation, passed(operation, (3,), (5, 2)))

    def samples_of_another(connection: Connection) -> None:
        tenancy.ensure_tenant(connection, "bob")
        for base_model in ("tiny", "large"):
            counts = {"sampled": 1200, "checkpoints": 1}
            accounts.add_usage(connection, "bob", "", "", base_model, counts)

    await server.ledger.write(samples_of_another)
    command = ["keys", "usage", "--data-dir", str(server.settings.data_dir)]
    table = (await asyncio.to_thread(CliRunner().invoke, app, command)).stdout.splitlines()
    assert [line.split() for line in table[1:]] == [
        ["bob", "0", "0", "0", "2,400", "2"],
        ["me", "8", "0", "0", "0", "0"],
    ]
    used = json.loads((await asyncio.to_thread(CliRunner().invoke, app, [*command, "--json"])).stdout)
    assert used["bob"] == dict.fromkeys(accounts.COUNTERS, 0) | {"sampled": 2400, "checkpoints": 2}
    assert used["me"]["trained"] == 8


async def test_failures_and_refusals_count_nothing(server: Server) -> None:
    for submission in (gradients(1), sample(1)):
        operation = await server.operations.accept(submission)
        await finish(server, operation, messages.Failed(operation.request_id, "no", "user"))
    assert await counted(server) == []


async def test_an_answer_that_comes_twice_counts_once(server: Server) -> None:
    """It may come from a replay, for a submit that is sent again, or after a start without the first
    answer."""
    operation = await server.operations.accept(sample(1))
    stale = (await server.ledger.read(operations.unfinished))[0]
    await finish(server, operation, sampled(operation))
    server.operations.on_answer(sampled(operation))
    assert (await server.operations.accept(sample(1))).request_id == operation.request_id
    server.operations.on_answer(sampled(operation))
    again = Server(server.settings.data_dir)
    unseen = again.operations.load(stale)
    again.operations.on_answer(sampled(unseen))
    await unseen.finished.wait()
    again.ledger.close()
    await server.operations.settle()
    assert await counted(server) == [("s", MODEL, "tiny", 0, 3, 4, 5, 0)]


async def test_old_hours_and_entries_go(server: Server) -> None:
    operation = await server.operations.accept(sample(1))
    await finish(server, operation, sampled(operation))
    await server.ledger.write(lambda connection: accounts.audit(connection, "me", "session_created"))

    async def left() -> tuple[int, int]:
        await server.sweep.sweep()
        day = time.time() - 10 * DAY, time.time() + DAY
        entries = await server.ledger.read(
            lambda connection: accounts.audit_entries(connection, "me", *day, None, 100)
        )
        hours = [int(each) // accounts.HOUR for each in day]
        used = await server.ledger.read(lambda connection: accounts.usage_between(connection, "me", *hours))
        return len(entries), len(used)

    async def age(days: int) -> None:
        seconds = {"s": days * DAY, "h": days * 24}
        await server.ledger.write(
            lambda connection: [
                connection.execute(text("UPDATE audit SET at = at - :s"), seconds),
                connection.execute(text("UPDATE usage SET hour = hour - :h"), seconds),
            ]
        )

    await age(2)
    assert await left() == (1, 1)
    await age(2)
    assert await left() == (0, 0)


def test_postgresql_adds_up_too() -> None:
    for statement in (accounts._ADD["postgresql"], accounts.ADD_OF_MODEL["postgresql"]):
        compiled = str(statement.compile(dialect=postgresql.dialect()))
        assert "ON CONFLICT (owner, hour, session_id, run_id, base_model) DO UPDATE SET trained =" in compiled
