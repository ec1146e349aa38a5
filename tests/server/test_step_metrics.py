"""Step metrics: one row per answered training operation, bounded, and read back as a curve."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
from engineless import MODEL, Server, add_metrics, model
from sqlalchemy import Connection, delete, func, select, update
from tinsmith.engine import messages
from tinsmith.server.ledger import operations as operations_rows
from tinsmith.server.ledger import step_metrics as rows
from tinsmith.server.ledger.schema import models, operations, payloads, step_metrics
from tinsmith.server.operations.curves import Curve, curve, parse_cursor
from tinsmith.server.operations.operation import Submission, natural_key


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    started = Server(tmp_path)
    await started.ledger.write(model)
    await started.runs.find("me", MODEL)
    yield started
    started.ledger.close()


async def answer(server: Server, kind: str, number: int, output: messages.Output, seconds: float) -> None:
    def message(request_id: str) -> messages.ToEngine:
        if kind == "optim_step":
            return messages.OptimStep(request_id, MODEL)
        return messages.ForwardBackward(request_id, MODEL, [], "cross_entropy")

    operation = await server.operations.accept(
        Submission("me", kind, natural_key(MODEL, number), message, model_id=MODEL, seq_id=number)
    )
    server.operations.on_answer(messages.Done(operation.request_id, output, seconds))
    await operation.finished.wait()


def passed(loss: float, tokens: int, **more: float) -> messages.ForwardBackwardOutput:
    metrics = {"loss:sum": loss, "tokens:sum": float(tokens), "valid_tokens:sum": float(tokens)}
    return messages.ForwardBackwardOutput(
        [], metrics | {name.replace("__", ":"): v for name, v in more.items()}
    )


def stepped(step: int) -> messages.OptimStepOutput:
    return messages.OptimStepOutput({"optimizer_step": float(step), "grad_norm": 2.0, "learning_rate": 1e-3})


async def read(server: Server, cursor: str = "0") -> Curve:
    since = parse_cursor(cursor)
    found = await server.ledger.read(
        lambda connection: rows.since(connection, MODEL, number=since[0], reported_at=since[1])
    )
    return curve(found, since)


async def count(server: Server) -> int:
    query = select(func.count()).select_from(step_metrics)
    return await server.ledger.read(lambda connection: connection.execute(query).scalar() or 0)


async def test_passes_belong_to_the_step_after_them(server: Server) -> None:
    await answer(server, "forward_backward", 1, passed(6.0, 2, ratio__max=1.5, clip__mean=0.0), 0.5)
    await answer(server, "forward_backward", 2, passed(6.0, 4, ratio__max=1.25, clip__mean=0.3), 0.5)
    await answer(server, "forward", 3, passed(8.0, 4), 0.25)
    await answer(server, "optim_step", 4, stepped(1), 0.1)
    await answer(server, "forward_backward", 5, passed(3.0, 3), 0.5)
    found = await read(server)
    first, open_step = found.points
    assert (first.step, first.complete) == (1, True)
    assert first.metrics["loss_per_token"] == pytest.approx((6 + 6) / (2 + 4))
    assert first.metrics["ratio:max"] == 1.5
    assert first.metrics["clip:mean"] == pytest.approx((0.0 * 2 + 0.3 * 4) / 6)
    assert first.metrics["forward/loss_per_token"] == pytest.approx(2.0)
    assert first.metrics["grad_norm"] == 2.0
    assert first.metrics["learning_rate"] == 1e-3
    assert first.metrics["tokens_per_second"] == pytest.approx(6 / (0.5 + 0.5 + 0.1))
    assert (open_step.step, open_step.complete) == (2, False)
    await answer(server, "optim_step", 6, stepped(2), 0.1)
    (second,) = (await read(server, found.cursor)).points
    assert (second.step, second.complete) == (2, True)
    assert second.metrics["loss_per_token"] == pytest.approx(1.0)


async def test_metrics_outlive_the_server_and_leave_with_the_model(server: Server, tmp_path: Path) -> None:
    await answer(server, "optim_step", 1, stepped(1), 0.1)
    server.ledger.close()
    again = Server(tmp_path)
    assert [point.step for point in (await read(again)).points] == [1]

    def forget(connection: Connection) -> None:
        for table in (payloads, operations):
            connection.execute(delete(table))
        connection.execute(delete(models).where(models.c.id == MODEL))

    await again.ledger.write(forget)
    assert await count(again) == 0
    again.ledger.close()


async def test_a_long_run_keeps_its_newest_steps_whole_and_older_ones_ever_thinner(server: Server) -> None:
    def train(connection: Connection) -> None:
        for number in range(1, 10_001):
            if number % 2:
                metrics = {"loss:sum": 1.0, "valid_tokens:sum": 1.0}
                add_metrics(connection, "forward_backward", number, metrics, None)
            else:
                add_metrics(connection, "optim_step", number, {"grad_norm": 1.0}, number // 2)

    await server.ledger.write(train)
    assert await count(server) <= rows.MOST_ROWS + 256
    steps = [point.step for point in (await read(server)).points]
    assert steps[-200:] == list(range(4801, 5001))
    oldest, middle = sum(step <= 1000 for step in steps), sum(3000 < step <= 4000 for step in steps)
    assert 0 < oldest < middle
    with_loss = sum("loss_per_token" in point.metrics for point in (await read(server)).points)
    assert with_loss > 0.95 * len(steps)


async def test_answers_thin_their_model_s_metrics_now_and_then(server: Server) -> None:
    def train(connection: Connection) -> None:
        for number in range(10_000, 10_000 + 2 * rows.MOST_ROWS):
            operations_rows.add_metrics(connection, MODEL, "forward", number, {"loss:sum": 1.0})

    await server.ledger.write(train)
    for number in range(1, rows.THIN_EVERY + 1):
        await answer(server, "optim_step", number, stepped(number), 0.0)
    await server.operations.settle()
    assert await count(server) <= rows.MOST_ROWS


async def test_a_tenant_s_metrics_are_bounded_in_bytes(server: Server) -> None:
    def train(connection: Connection) -> None:
        wide = {f"{name:02}{'x' * 200}": 1.0 for name in range(100)}
        for number in range(1, 400):
            add_metrics(connection, "optim_step", number, wide | {"nan": math.nan}, number)

    await server.ledger.write(train)

    def size(connection: Connection) -> int:
        return connection.execute(select(func.sum(step_metrics.c.size))).scalar() or 0

    assert await server.ledger.read(size) < 400 * 64 * 160
    most = 500_000
    assert await server.ledger.read(partial(rows.crowded, most_bytes=most)) == ["me"]
    while await server.ledger.write(partial(rows.thin_owner, owner="me", most_bytes=most)):
        pass
    assert 0 < await server.ledger.read(size) <= most


async def test_reports_are_bounded_whatever_numbers_a_client_gives_its_steps(server: Server) -> None:
    def report(connection: Connection) -> None:
        for number in range(2 * rows.MOST_ROWS):
            rows.report(connection, MODEL, 1 + number * 16 * (1 << 31), {"reward": float(number)})

    await server.ledger.write(report)
    assert await count(server) <= rows.MOST_ROWS
    newest = max(point.time for point in (await read(server)).points)
    (last,) = (point for point in (await read(server)).points if point.time == newest)
    assert last.metrics == {"reward": 2.0 * rows.MOST_ROWS - 1}


async def test_sums_that_are_not_finite_are_left_out(server: Server) -> None:
    for number in (1, 2):
        await answer(server, "forward_backward", number, passed(1.7e308, 2), 0.5)
    await answer(server, "optim_step", 3, stepped(1), 0.1)
    (point,) = (await read(server)).points
    assert "loss:sum" not in point.metrics
    assert all(math.isfinite(value) for value in point.metrics.values())


async def test_runs_that_rest_are_thinned_by_the_sweep(tmp_path: Path) -> None:
    server = Server(tmp_path, step_metrics_seconds=60)

    def train(connection: Connection) -> None:
        model(connection)
        for number in range(1, 1001):
            add_metrics(connection, "optim_step", number, {"grad_norm": 1.0}, number)
        connection.execute(update(step_metrics).values(at=step_metrics.c.at - 120))

    await server.ledger.write(train)
    await server.sweep.sweep()
    assert 128 <= await count(server) <= 256
    server.ledger.close()


async def test_a_client_s_metrics_join_the_step_of_their_number(server: Server) -> None:
    await answer(server, "optim_step", 1, stepped(1), 0.1)
    first = await read(server)
    await server.ledger.write(partial(rows.report, model_id=MODEL, step=1, metrics={"reward": 0.5}))
    await server.ledger.write(partial(rows.report, model_id=MODEL, step=1, metrics={"accuracy": 0.25}))
    (point,) = (await read(server)).points
    assert (point.metrics["reward"], point.metrics["accuracy"], point.metrics["grad_norm"]) == (
        0.5,
        0.25,
        2.0,
    )
    (later,) = (await read(server, first.cursor)).points
    assert later.metrics == {"reward": 0.5, "accuracy": 0.25}
