"""The server's memory is bounded, whatever clients do and however slowly they read."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from engineless import MODEL, Server, model
from msgspec import structs
from tinsmith.engine import messages
from tinsmith.server.models import runs as runs_module
from tinsmith.server.models.run import NewRun
from tinsmith.server.models.samplers import Recent
from tinsmith.server.operations import sample_streams
from tinsmith.server.operations.operation import KnownOperations, Operation, Submission
from tinsmith.server.operations.sample_streams import SampleStreams


def drawn(request_id: str, begin: int, tokens: int = 1000, k: int = 0) -> messages.Drawn:
    topk = messages.TopK(bytes(4 * tokens * k), bytes(4 * tokens * k), k, tokens) if k else None
    return messages.Drawn(request_id, 0, begin, bytes(4 * tokens), bytes(4 * tokens), topk)


async def read(streams: SampleStreams, operation: Operation) -> list[int]:
    """Poll until the answer is there; return what the client was told."""
    stream = streams.of(operation.request_id)
    assert stream is not None
    return [each.begin async for each in stream.until_answered(operation)]


def sample(request_id: str) -> Operation:
    return Operation(request_id, "me", "sample", "", 0, {})


async def test_a_quick_reader_gets_everything() -> None:
    streams, operation = SampleStreams(), sample("a")
    streams.open("a", "me")
    reading = asyncio.ensure_future(read(streams, operation))
    for number in range(3000):  # more bytes than may wait at once
        streams.add(drawn("a", number))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    operation.finished.set()
    assert await reading == list(range(3000))


async def test_a_slow_reader_gets_the_beginning_and_the_end_has_the_rest() -> None:
    streams, operation = SampleStreams(), sample("a")
    streams.open("a", "me")
    for number in range(3000):
        streams.add(drawn("a", number, k=2))
    stream = streams.of("a")
    assert stream is not None
    assert 0 < stream.waiting_bytes <= sample_streams._STREAM_BYTES
    reading = asyncio.ensure_future(read(streams, operation))
    await asyncio.sleep(0.05)
    streams.add(drawn("a", 3000))  # there is room again, but not for a stream with a gap
    operation.finished.set()
    told = await reading
    assert told == list(range(len(told)))
    assert 10 < len(told) < 100


def test_the_slow_readers_of_one_owner_cost_no_other() -> None:
    streams = SampleStreams()
    for number in range(100):
        streams.open(f"mine-{number}", "me")
        for begin in range(200):
            streams.add(drawn(f"mine-{number}", begin))
    waiting = streams.of("mine-0").of_owner  # type: ignore[union-attr]
    assert waiting.bytes <= sample_streams._OWNER_BYTES
    streams.open("theirs", "you")
    streams.add(drawn("theirs", 0))
    assert streams.of("theirs").waiting_bytes > 0  # type: ignore[union-attr]
    for number in range(100):
        streams.close(f"mine-{number}")
    streams.close("mine-0")
    assert waiting.bytes == waiting.streams == 0
    assert set(streams._waiting) == {"you"}


async def test_models_that_have_finished_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last of them are remembered; the ledger knows the others."""
    monkeypatch.setattr(runs_module, "_MOST_OVER", 2)
    server = Server(tmp_path)
    await server.ledger.write(model)
    creation = messages.CreateModel("c", MODEL, "tiny", None)
    names = [f"s:train:{number}" for number in range(1, 5)]
    for name in names:
        new = NewRun("me", "s", f"create/{name}", structs.replace(creation, model_id=name), {}, {}, {})
        await server.runs.create(replace(new, alias=f"alias-{name}"))
        run = await server.runs.find("me", f"alias-{name}")
        server.operations.on_answer(messages.Done(run.create_message.request_id, messages.Nothing()))
        run.resident = False  # there is no engine that it could leave
        await server.runs.finish(run)
        assert run.leaving is not None
        await run.leaving
    assert [name for name in names if server.runs.known(name)] == names[2:]
    assert server.runs.alive("me") == []
    again = await server.runs.find("me", f"alias-{names[0]}")
    assert (again.id, again.state) == (names[0], "finished")
    assert server.runs.last_seq(again) == 0
    server.ledger.close()


async def test_models_that_rest_are_forgotten_and_go_on_where_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(tmp_path)
    await server.ledger.write(model)
    run = await server.runs.find("me", MODEL)

    def step(number: int) -> Submission:
        return Submission(
            "me",
            "optim_step",
            f"{MODEL}/{number}",
            lambda request_id: messages.OptimStep(request_id, MODEL, messages.AdamParams()),
            model_id=MODEL,
            seq_id=number,
        )

    first = await server.operations.accept(step(1))
    monkeypatch.setattr(runs_module, "_REMEMBERED_SECONDS", 0.0)
    server.runs.forget_unused()
    assert server.runs.known(MODEL) is run, "its operation is not answered"
    server.operations.on_answer(messages.Done(first.request_id, messages.OptimStepOutput({})))
    await first.finished.wait()
    run.resident = True
    server.runs.forget_unused()
    assert server.runs.known(MODEL) is run, "the engine has it"
    run.resident, run.restoring = False, None
    monkeypatch.setattr(runs_module, "_REMEMBERED_SECONDS", 60.0)
    server.runs.forget_unused()
    assert server.runs.known(MODEL) is run, "a request may hold it"
    monkeypatch.setattr(runs_module, "_REMEMBERED_SECONDS", 0.0)
    server.runs.forget_unused()
    assert server.runs.known(MODEL) is None
    assert server.runs.alive("me") == []
    again = await server.runs.find("me", MODEL)
    assert again is not run
    assert server.runs.last_seq(again) == 1
    assert (await server.operations.accept(step(1))).request_id == first.request_id
    second = await server.operations.accept(step(2))
    assert server.operations.unanswered(MODEL) == [second]
    server.ledger.close()


async def test_pending_operations_are_found_by_model_however_many_others_have(tmp_path: Path) -> None:
    pending = KnownOperations()
    for number in range(5):
        pending.add(Operation(f"r{number}", "me", "optim_step", f"m{number % 2}", number, {}))
    assert [each.seq_id for each in pending.waiting_of("m0")] == [0, 2, 4]
    third = pending["r2"]
    pending.discard(third)
    pending.discard(third)
    assert [each.seq_id for each in pending.waiting_of("m0")] == [0, 4]
    assert [each.seq_id for each in pending.waiting.values()] == [0, 1, 3, 4]
    assert pending.waiting_of("m2") == []


def test_the_most_recently_used_items_are_remembered() -> None:
    recent: Recent[int, str] = Recent(3)
    for number in range(3):
        recent[number] = str(number)
    assert recent.get(0, None) == "0"
    recent[3] = "3"
    assert [recent.get(number, None) for number in range(4)] == ["0", None, "2", "3"]
    recent[2] = "two"
    assert recent.get(2, None) == "two"
    recent.discard(2)
    recent.discard(2)
    assert len(recent) == 2
