"""The sweep: what it removes from the disk, and what it leaves there."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from engineless import DAY, MODEL, Server, model, sample
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Connection, text
from tinsmith.ckpt.paths import CheckpointUri
from tinsmith.engine import messages
from tinsmith.server.errors import BadRequest
from tinsmith.server.ledger import accounts, retention, tenancy
from tinsmith.server.ledger import checkpoints as checkpoint_rows
from tinsmith.server.operations.operation import Operation, Submission, natural_key


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    started = Server(tmp_path)
    await started.ledger.write(model)
    yield started
    started.ledger.close()


async def test_an_old_answer_is_gone_and_its_sample_is_not_run_again(server: Server) -> None:
    old = await server.sample(1)
    await server.age(2 * DAY)
    young = await server.sample(2)
    await server.sweep.sweep()
    again = Server(server.settings.data_dir)
    assert await again.operations.find("me", old) is None, "a poll is answered 410"
    assert await again.operations.find("me", young) is not None
    resubmitted = await again.operations.accept(sample(1))
    assert resubmitted.request_id == old
    assert again.operations.unanswered() == []
    await again.age(8 * DAY)
    await again.sweep.sweep()
    assert (await again.operations.accept(sample(1))).request_id != old, "after a week nobody resends it"
    again.ledger.close()


async def test_the_newest_answers_stay_when_there_are_too_many(server: Server) -> None:
    requests = []
    for number in range(5):
        requests.append(await server.sample(number, tokens=1000))
        await server.age(1)
    crowded = Server(server.settings.data_dir, answer_bytes=20_000)
    await crowded.sweep.sweep()
    kept = [await crowded.operations.find("me", request) is not None for request in requests]
    assert kept == [False, False, False, True, True], "8 kB each"
    crowded.ledger.close()


async def test_a_tenant_with_huge_answers_expires_no_other_s(server: Server) -> None:
    """Tenants share the bytes; one with less than its share keeps everything, however old."""
    await server.ledger.write(lambda connection: tenancy.ensure_tenant(connection, "greedy"))
    await server.ledger.write(lambda connection: tenancy.ensure_tenant(connection, "middling"))
    small = [await server.sample(number, tokens=100) for number in range(3)]
    await server.age(60)
    mine, middling = [], []
    for number in range(10):
        mine.append(await server.sample(100 + number, tokens=5000, owner="greedy"))
        middling.append(await server.sample(200 + number, tokens=1000, owner="middling"))
        await server.age(1)
    crowded = Server(server.settings.data_dir, answer_bytes=200_000)
    await crowded.sweep.sweep()

    async def kept(owner: str, requests: list[str]) -> list[bool]:
        return [await crowded.operations.find(owner, request) is not None for request in requests]

    assert all(await kept("me", small))
    assert all(await kept("middling", middling)), "80 kB, which is less than its share"
    assert await kept("greedy", mine) == [False] * 8 + [True] * 2, "40 kB each; about 115 kB are left for it"
    sizes = await crowded.ledger.read(retention.answer_bytes)
    assert sum(sizes.values()) <= 200_000
    crowded.ledger.close()


@given(st.lists(st.integers(0, 1000), max_size=20), st.integers(0, 5000))
def test_a_fair_share_leaves_nothing_unused_that_a_tenant_wants(sizes: list[int], total: int) -> None:
    share = retention.fair_share(sizes, total)
    kept = [min(size, share) for size in sizes]
    if sum(sizes) <= total:
        assert kept == sizes
    else:
        assert total - len(sizes) < sum(kept) <= total, "but for what cannot be divided"


async def test_a_model_s_operations_stay_while_a_replay_needs_them_and_never_run_twice(
    server: Server,
) -> None:
    def step(number: int) -> Submission:
        params = messages.AdamParams()
        return Submission(
            "me",
            "optim_step",
            natural_key(MODEL, number),
            lambda request_id: messages.OptimStep(request_id, MODEL, params),
            model_id=MODEL,
            seq_id=number,
        )

    async def rows() -> list[tuple[int, bool, bool]]:
        return await server.ledger.read(
            lambda connection: [
                tuple(row)
                for row in connection.execute(
                    text(
                        "SELECT o.seq_id, p.size IS NOT NULL, answer IS NOT NULL FROM operations AS o"
                        " LEFT JOIN payloads AS p ON p.operation_id = o.id ORDER BY 1"
                    )
                )
            ]
        )

    await server.runs.find("me", MODEL)
    for number in (1, 2, 3):
        operation = await server.operations.accept(step(number))
        output = messages.OptimStepOutput({})
        server.operations.on_answer(messages.Done(operation.request_id, output))
        await operation.finished.wait()
    await server.age(2 * DAY)
    await server.sweep.sweep()
    assert await rows() == [(1, 1, 0), (2, 1, 0), (3, 1, 0)], "a replay needs their messages"

    await server.payloads.forget_through(MODEL, 2)
    await server.sweep.sweep()
    assert await rows() == [(3, 1, 0)]
    again = Server(server.settings.data_dir)
    await again.runs.find("me", MODEL)
    with pytest.raises(BadRequest, match="had its turn"):
        await again.operations.accept(step(1))
    assert (await again.operations.accept(step(3))).expired
    again.ledger.close()

    await server.ledger.write(lambda connection: tenancy.update_model(connection, MODEL, state="finished"))
    await server.sweep.sweep()
    assert await rows() == [], "nobody will bring it back"


@pytest.fixture
def save(server: Server):
    async def save(name: str, state: str = "complete", expires_at: float | None = None) -> Path:
        uri = CheckpointUri(MODEL, "weights", name)
        directory = f"checkpoints/s@train@0/weights/{name}-{time.time_ns()}"
        path = server.settings.data_dir / directory
        path.mkdir(parents=True)
        (path / "file").write_bytes(bytes(1000))

        def change(connection: Connection) -> None:
            checkpoint_rows.add(
                connection,
                uri,
                owner="me",
                operation_id=directory,
                directory=directory,
                base_model="tiny",
                lora=None,
                optimizer={},
                user_metadata=None,
                expires_at=expires_at,
            )
            if state != "pending":
                size = 1000 if state == "complete" else None
                checkpoint_rows.settle(connection, directory, size)

        await server.ledger.write(change)
        return path

    return save


async def test_directories_of_dead_checkpoints_go(server: Server, save) -> None:
    """Also those that a crash left between the ledger and the disk."""
    kept = await save("kept", expires_at=time.time() + 60)
    pending = await save("pending", state="pending")
    overwritten, current = await save("twice"), await save("twice")
    failed = await save("failed", state="failed")
    expired = await save("expired", expires_at=time.time() - 1)
    root = server.settings.data_dir
    orphan = root / "checkpoints/s@train@0/weights/orphan-1"
    cut_short = kept.with_name(kept.name + ".orbax-checkpoint-tmp-0")
    in_the_making = pending.with_name(pending.name + ".tmp-" + "0" * 32)
    lost_snapshot = root / "snapshots/s@train@0/7-0"
    of_another_ledger = root / "checkpoints/other@train@0/weights/x-1"
    for folder in (orphan, cut_short, in_the_making, lost_snapshot, of_another_ledger):
        folder.mkdir(parents=True)
    await server.sweep.sweep()
    for path in (kept, pending, current, in_the_making, of_another_ledger):
        assert path.is_dir(), path
    for path in (overwritten, failed, expired, orphan, cut_short, lost_snapshot):
        assert not path.exists(), path
    assert server.sweep.used_bytes["checkpoints"] == 3000
    assert server.sweep.used_bytes["ledger"] > 0


@pytest.mark.parametrize(
    ("kind", "counted"),
    [
        ("save_weights", "checkpoints"),
        ("save_weights_for_sampler", "checkpoints"),
        ("save_unnamed_sampler", "samplers"),
    ],
)
async def test_the_bytes_of_a_save_are_counted_by_kind(server: Server, kind: str, counted: str) -> None:
    operation = Operation("req_1", "alice", kind, MODEL, 1, {})
    operation.answer = messages.Done("req_1", messages.SamplerSaved(1000))
    server.sweep.written(operation)
    assert {kind for kind, used in server.sweep.used_bytes.items() if used} == {counted}
    assert server.sweep.used_bytes[counted] == 1000


async def test_directories_that_a_replay_or_a_sampler_needs_stay(
    tmp_path: Path, server: Server, save
) -> None:
    loaded, sampled = await save("loaded"), await save("sampled")

    def key(path: Path) -> str:
        return str(path.relative_to(server.settings.data_dir))

    def change(connection: Connection) -> None:
        creation = messages.CreateModel("c", MODEL, "tiny", None, checkpoint=key(loaded))
        tenancy.update_model(connection, MODEL, creation=messages.encode(creation))
        tenancy.add_sampler(
            connection,
            id="s:sample:0",
            owner="me",
            session_id="s",
            base_model="tiny",
            model_path="tinker://…",
            directory=key(sampled),
        )

    await server.ledger.write(change)
    await server.checkpoints.delete("me", CheckpointUri(MODEL, "weights", "loaded"))
    await save("sampled")  # its name moves on
    await server.sweep.sweep()
    assert loaded.is_dir(), "the model has no snapshot of its own yet"
    assert sampled.is_dir(), "a sampler keeps its weights"

    def end(connection: Connection) -> None:
        tenancy.finish_session(connection, "s", "success", None)
        tenancy.update_model(connection, MODEL, state="finished")

    await server.ledger.write(end)
    await server.sweep.sweep()
    assert not loaded.exists()
    assert not sampled.exists()


async def test_an_ended_model_leaves_the_ledger_after_a_month_if_it_has_no_checkpoints(
    server: Server, save
) -> None:
    """The model's operations go with it, and its session takes as many bytes as before it was created."""

    def set_up(connection: Connection) -> dict[str, int]:
        tenancy.add_session(connection, id="t", owner="me", tags=[], user_metadata={})
        empty = tenancy.find_session(connection, "t").size_bytes
        creation = messages.encode(messages.CreateModel("c", "m", "tiny", None))
        fields = {"base_model": "tiny", "lora": {"rank": 4}, "optimizer": {}, "user_metadata": {"a": "b"}}
        for name, state in (("alive", "ready"), ("ended", "finished"), ("failed", "failed")):
            of_it = {"id": f"t:train:{name}", "owner": "me", "session_id": "t", "creation": creation}
            tenancy.add_model(connection, **of_it, **fields, state=state)
        tenancy.update_model(connection, MODEL, state="finished")
        return empty

    empty = await server.ledger.write(set_up)
    await save("kept")
    for model_id in ("t:train:ended", "t:train:alive"):
        asked = Submission(
            "me", "create_model", f"of {model_id}", lambda r: messages.DeleteModel(r, "x"), model_id=model_id
        )
        operation = await server.operations.accept(asked)
        server.operations.on_answer(messages.Done(operation.request_id, messages.OptimStepOutput({})))
        await operation.finished.wait()

    async def left(days: float) -> tuple[set[str], set[str], int]:
        def read(connection: Connection) -> tuple[set[str], set[str], int]:
            of_models = connection.execute(text("SELECT id FROM models")).scalars()
            asked = connection.execute(text("SELECT model_id FROM operations")).scalars()
            return set(of_models), set(asked), tenancy.find_session(connection, "t").size_bytes

        now = {"at": time.time() - days * DAY}
        await server.ledger.write(
            lambda connection: connection.execute(text("UPDATE models SET last_request_at = :at"), now)
        )
        await server.sweep.sweep()
        return await server.ledger.read(read)

    before = await left(days=29)
    assert before[0] == {MODEL, "t:train:alive", "t:train:ended", "t:train:failed"}
    assert before[1] == {"t:train:alive", "t:train:ended"}
    after = await left(days=31)
    assert after[:2] == ({MODEL, "t:train:alive"}, {"t:train:alive"}), "one has a checkpoint, one is alive"
    assert after[2] - empty == pytest.approx((before[2] - empty) / 3, rel=0.01)
    await server.checkpoints.delete("me", CheckpointUri(MODEL, "weights", "kept"))
    assert (await left(days=31))[0] == {"t:train:alive"}


async def test_the_audit_log_of_one_tenant_is_bounded(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinsmith.server.checkpoints.sweep._MOST_AUDITED", 10)

    def fill(connection: Connection) -> None:
        tenancy.ensure_tenant(connection, "busy")
        for number in range(1, 2500):
            accounts.audit(connection, "busy", "session_created", number=number)
        accounts.audit(connection, "me", "session_created", number=0)

    await server.ledger.write(fill)
    await server.sweep.sweep()

    def numbers(connection: Connection, owner: str) -> list[int]:
        found = accounts.audit_entries(connection, owner, 0, time.time() + 1, None, 10_000)
        return [row.details["number"] for row in found]

    kept = await server.ledger.read(lambda connection: numbers(connection, "busy"))
    assert kept == list(range(2500 - len(kept), 2500))
    assert 8 <= len(kept) <= 10
    assert await server.ledger.read(lambda connection: numbers(connection, "me")) == [0]
