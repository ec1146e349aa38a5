"""Payloads: written once, forgotten without holding anybody up, and not in memory while they wait."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import prerelease_ledgers
import pytest
from engineless import MODEL, Server, model
from small_disk import fill, small_disk
from tinsmith.engine import messages
from tinsmith.server.errors import StorageFull
from tinsmith.server.ledger import payloads as rows
from tinsmith.server.ledger.payloads import FILE_BYTES, PayloadFiles, PayloadLost
from tinsmith.server.operations.answers import KEPT
from tinsmith.server.operations.operation import Submission, natural_key


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    started = Server(tmp_path)
    await started.ledger.write(model)
    await started.runs.find("me", MODEL)
    yield started
    started.ledger.close()


def step(number: int, size: int) -> Submission:
    """A `forward_backward` of a payload of about that size; each has content of its own."""
    tokens = number.to_bytes(4, "little") * (size // 4)
    datum = messages.Datum(tokens, {})
    return Submission(
        "me",
        "forward_backward",
        natural_key(MODEL, number),
        lambda request_id: messages.ForwardBackward(request_id, MODEL, [datum], "cross_entropy"),
        model_id=MODEL,
        seq_id=number,
    )


async def accept_and_answer(server: Server, number: int, size: int) -> str:
    operation = await server.operations.accept(step(number, size))
    output = messages.ForwardBackwardOutput([], {}, None)
    server.operations.on_answer(messages.Done(operation.request_id, output))
    await operation.finished.wait()
    return operation.request_id


def files(server: Server) -> list[Path]:
    return sorted((server.settings.payload_dir / server.ledger.id).glob("*.payloads"))


@pytest.mark.parametrize("size", [100, 8000, 9000, 500_000])
async def test_a_payload_is_what_was_submitted_also_after_a_start(server: Server, size: int) -> None:
    operation = await server.operations.accept(step(1, size))
    again = Server(server.settings.data_dir)
    await again.runs.resume()
    (unanswered,) = again.operations.unanswered(MODEL)
    assert unanswered.request_id == operation.request_id
    assert again.payloads.remembered(operation.request_id) is None, "it is read when it is needed"
    for each in (server, again):
        message = await each.operations.message(unanswered)
        assert isinstance(message, messages.ForwardBackward)
        assert message.data[0].tokens == (1).to_bytes(4, "little") * (size // 4)
    again.ledger.close()


async def test_a_resubmission_writes_nothing(server: Server) -> None:
    first = await server.operations.accept(step(1, 100_000))
    sizes = [path.stat().st_size for path in files(server)]
    for _ in range(3):
        assert (await server.operations.accept(step(1, 100_000))).request_id == first.request_id
    together = await asyncio.gather(*(server.operations.accept(step(2, 100_000)) for _ in range(4)))
    assert len({operation.request_id for operation in together}) == 1
    assert sum(path.stat().st_size for path in files(server)) < 2 * sum(sizes) + 300_000
    message = await server.operations.message(together[0])
    assert isinstance(message, messages.ForwardBackward)
    assert message.data[0].tokens[:4] == (2).to_bytes(4, "little")


async def test_payloads_that_a_snapshot_covers_leave_the_disk(server: Server) -> None:
    for number in (1, 2, 3):
        await accept_and_answer(server, number, 100_000)
    server.payloads.seal(MODEL)  # as a snapshot does when it begins
    for number in (4, 5):
        await accept_and_answer(server, number, 100_000)
    assert len(files(server)) == 2
    await server.payloads.forget_through(MODEL, 3)
    assert len(files(server)) == 1
    assert files(server)[0].stat().st_size < 250_000
    replay = await server.ledger.read(lambda connection: rows.to_replay(connection, MODEL, 0, 10))
    assert [await server.payloads.load(row.operation_id) is not None for row in replay] == [True, True]
    assert (files(server)[0].stat().st_mode & 0o777, files(server)[0].parent.stat().st_mode & 0o777) == (
        0o600,
        0o700,
    )


async def test_a_kill_between_a_payload_and_its_row_leaves_nothing(server: Server) -> None:
    """Bytes that no row points to go with the next start, and what rows point to stays."""
    kept = await server.operations.accept(step(1, 100_000))
    orphan = PayloadFiles(server.settings.payload_dir / server.ledger.id)
    orphan.append("another stream", bytes(100_000))
    assert len(files(server)) == 2
    again = Server(server.settings.data_dir)
    await again.payloads.remove_unused()
    assert len(files(server)) == 1
    assert await again.payloads.load(kept.request_id) is not None
    again.ledger.close()


async def test_another_ledger_s_payloads_are_let_alone(server: Server) -> None:
    """The other ledger was put aside for a while, and may come back."""
    await server.operations.accept(step(1, 100_000))
    path = server.settings.data_dir / "ledger.db"
    server.ledger.close()
    path.rename(path.with_name("aside.db"))
    other = Server(server.settings.data_dir)
    await other.payloads.remove_unused()
    other.ledger.close()
    assert len(files(server)) == 1


async def test_a_damaged_payload_is_noticed(server: Server) -> None:
    first = await server.operations.accept(step(1, 100_000))
    server.payloads.forget(first.request_id)
    (path,) = files(server)
    content = bytearray(path.read_bytes())
    content[50_000] ^= 1
    path.write_bytes(content)
    with pytest.raises(PayloadLost, match="damaged"):
        await server.operations.message(first)
    path.unlink()
    with pytest.raises(PayloadLost, match="is gone"):
        await server.operations.message(first)


async def test_a_failed_operation_keeps_what_a_replay_needs_and_no_more(server: Server) -> None:
    refused = await server.operations.accept(step(1, 100_000))
    server.operations.fail([refused], "too long", ran=True)
    await refused.finished.wait()
    message = await server.operations.message(refused)
    assert isinstance(message, messages.ForwardBackward)
    assert message.data == [], "the engine counts the failure"
    never_ran = await server.operations.accept(step(2, 100_000))
    server.operations.fail([never_ran], "given up", ran=False)
    await never_ran.finished.wait()
    assert await server.operations.message(never_ran) is None


def test_streams_have_files_of_their_own_which_are_bounded(tmp_path: Path) -> None:
    files = PayloadFiles(tmp_path)
    large = bytes(FILE_BYTES // 2)
    stored = [files.append("a", large) for _ in range(3)] + [files.append("b", b"x")]
    assert len({each.file for each in stored}) == 3
    for each in stored:
        files.committed(each)
    used = {stored[2].file, stored[3].file}
    assert files.remove_unused(lambda: used) == FILE_BYTES  # type: ignore[arg-type, return-value]
    assert files.read(stored[2]) == large


def test_appends_of_many_threads_do_not_mix(tmp_path: Path) -> None:
    files = PayloadFiles(tmp_path)
    stored = {}

    def write(number: int) -> None:
        for turn in range(20):
            payload = bytes([number]) * (1000 + turn)
            stored[number, turn] = files.append("one", payload), payload
            if turn % 5 == number:
                files.seal("one")
            if turn % 7 == 3:
                files.abandoned(stored.pop((number, turn))[0])

    threads = [threading.Thread(target=write, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(files.read(where) == payload for where, payload in stored.values())


async def test_without_room_nothing_is_accepted_and_nothing_is_left(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "4m") as disk:
        server = Server(disk)
        await server.ledger.write(model)
        await server.runs.find("me", MODEL)
        await server.operations.accept(step(1, 100_000))
        ballast = fill(disk, leave=300_000)
        with pytest.raises(StorageFull):
            await server.operations.accept(step(2, 1 << 20))
        assert sum(path.stat().st_size for path in files(server)) < 110_000
        ballast.unlink()
        second = await server.operations.accept(step(2, 1 << 20))
        assert await server.payloads.load(second.request_id) is not None
        server.ledger.close()


async def test_forgetting_delays_no_other_tenant(server: Server) -> None:
    """400 payloads of 500 kB: bytes are written about once, and another tenant's writes wait little while
    they are forgotten. bench/ledger.py measures 1,000."""
    count, size = 400, 500_000

    def written() -> int:
        with Path("/proc/self/io").open() as file:
            return int(dict(line.split(": ") for line in file)["wchar"])

    async def waits(until: asyncio.Event) -> list[float]:
        took = []
        while not until.is_set():
            began = time.perf_counter()
            await server.ledger.write(lambda connection: None)
            took.append(time.perf_counter() - began)
            await asyncio.sleep(0.005)
        return took

    before = written()
    for number in range(1, count + 1):
        await accept_and_answer(server, number, size)
    assert written() - before < 1.5 * count * size
    server.payloads.seal(MODEL)
    done = asyncio.Event()
    other = asyncio.ensure_future(waits(done))
    await asyncio.sleep(0.02)
    began, before = time.perf_counter(), written()
    await server.payloads.forget_through(MODEL, count)
    took = time.perf_counter() - began
    done.set()
    longest = max(await other)
    assert files(server) == []
    assert longest < 1.0, f"{longest:.3f} s, of {took:.3f} s; 0.01 s on an idle machine"
    assert written() - before < 0.05 * count * size


async def test_waiting_operations_hold_no_payloads(server: Server) -> None:
    for number in range(2, 102):  # the first one is missing, so these wait
        await server.operations.accept(step(number, 500_000))
    held = [server.payloads.remembered(each.request_id) for each in server.operations.unanswered()]
    assert sum(len(each) for each in held if each is not None) <= 16 << 20
    assert len(held) == 100


async def test_payloads_of_older_ledgers_move_and_a_kill_in_between_loses_none(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    prerelease_ledgers.load(path, "0013")
    sizes = {f"r{number}": size for number, size in enumerate([10, 8192, 8193, 300_000, 5 << 20, 9 << 20])}
    sizes["loss"] = 100_000
    with sqlite3.connect(path) as old:
        old.execute("DELETE FROM operations")
        old.execute("INSERT INTO tenants (id, created_at) VALUES ('me', 1)")
        old.executemany(
            "INSERT INTO operations (id, owner, kind, model_id, seq_id, reply, state, payload, accepted_at)"
            " VALUES (?, 'me', ?, ?, ?, '{}', 'accepted', ?, 5)",
            [
                (
                    name,
                    "create_custom_loss" if name == "loss" else "forward_backward",
                    None if name == "loss" else MODEL,
                    None if name == "loss" else int(name[1:]) + 1,
                    os.urandom(size),
                )
                for name, size in sizes.items()
            ],
        )
        expected = dict(old.execute("SELECT id, payload FROM operations").fetchall())
    old.close()
    cut_short = Server(tmp_path)
    commits = 0

    def dies(change):
        nonlocal commits
        commits += 1
        if commits == 2:
            raise ConnectionError("killed")
        return write(change)

    write, cut_short.ledger.write = cut_short.ledger.write, dies  # type: ignore[method-assign]
    with pytest.raises(ConnectionError):
        await cut_short.payloads.move_old(KEPT)
    cut_short.ledger.close()
    server = Server(tmp_path)
    assert 0 < await server.payloads.move_old(KEPT) < len(sizes)
    await server.payloads.remove_unused()
    assert {name: await server.payloads.load(name) for name in sizes} == expected
    replay = await server.ledger.read(lambda connection: rows.to_replay(connection, MODEL, 0, 100))
    assert [row.operation_id for row in replay] == [name for name in sizes if name != "loss"]
    assert (await server.ledger.read(lambda connection: rows.find(connection, "loss"))).data is not None
    assert await server.payloads.move_old(KEPT) == 0
    server.ledger.close()
