"""Names and metadata of sessions are bounded, and count for their tenant alone."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import engineless
import pytest
from pydantic import TypeAdapter, ValidationError
from tinsmith.engine import messages
from tinsmith.server.errors import NotFound, QuotaExceeded
from tinsmith.server.ledger import tenancy
from tinsmith.server.models import losses as custom_losses
from tinsmith.server.wire import MOST_METADATA_BYTES, Metadata
from tinsmith.server.wire.requests import CreateModel, CreateSession, FinishSession, SaveWeights

NOTE = {"note": "x" * 10_000}


class Server(engineless.Server):
    """Sessions and samplers on a ledger, without an engine."""

    async def create(self, owner: str = "me", **fields) -> str:
        return await self.sessions.create(owner, {"tags": [], "user_metadata": NOTE} | fields)

    async def stored(self, owner: str = "me") -> int:
        return await self.ledger.read(lambda connection: tenancy.stored_bytes(connection, owner))


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    made = Server(tmp_path, max_metadata_bytes=100_000)
    for owner in ("me", "you"):
        await made.ledger.write(lambda connection, owner=owner: tenancy.ensure_tenant(connection, owner))
    yield made
    made.ledger.close()


async def fill(server: Server) -> list[str]:
    made: list[str] = []
    with pytest.raises(QuotaExceeded, match="quota is 100000"):  # noqa: PT012
        while True:
            made.append(await server.create())
    return made


async def test_open_sessions_take_a_bounded_number_of_bytes(server: Server) -> None:
    made = await fill(server)
    assert 100_000 <= await server.stored() < 100_000 + 11_000
    assert len(made) == 10
    with pytest.raises(QuotaExceeded):
        await server.create(user_metadata={})
    with pytest.raises(QuotaExceeded):
        await server.samplers.create("me", made[0], 0, "tiny", None, None)
    assert await server.create("you"), "another tenant's are its own"


async def test_metadata_leaves_with_its_session(server: Server) -> None:
    made = await fill(server)
    for session_id in made[:3]:
        await server.sessions.finish("me", session_id, "success", None)
    assert (await server.sessions.find("me", made[0])).user_metadata == NOTE, "while there is room"
    again = [await server.create() for _ in range(3)]
    with pytest.raises(QuotaExceeded):
        await server.create()
    for session_id in again:
        await server.sessions.finish("me", session_id, "errored", "x" * 1000)
    assert await server.create()


async def test_a_finished_session_with_a_sampler_keeps_its_row_alone(server: Server) -> None:
    first = await server.create()
    sampler = await server.samplers.create("me", first, 0, "tiny", None, None)
    await server.sessions.finish("me", first, "success", None)
    await fill(server)
    row = await server.sessions.find("me", first)
    assert row.user_metadata == {}
    assert row.size_bytes == tenancy.ROW_BYTES
    assert (await server.samplers.find("me", sampler.id)).session_id == first


async def test_samplers_count_too_and_unnamed_ones_leave(server: Server) -> None:
    session_id = await server.create(user_metadata={})
    before = await server.stored()
    await server.samplers.create("me", session_id, 0, "tiny", None, f"samplers/{session_id}/x")
    assert await server.stored() == before + tenancy.ROW_BYTES
    await server.samplers.forget_unnamed(session_id)
    assert await server.stored() == before
    with pytest.raises(QuotaExceeded):  # noqa: PT012
        for number in range(1000):
            await server.samplers.create("me", session_id, number, "tiny", None, None)


async def test_custom_losses_count_and_leave_with_their_session(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(custom_losses, "_CHECKED_WITHIN", 0.0)
    losses = custom_losses.CustomLosses(server.ledger, server.operations, server.quotas, True)
    loss = messages.CustomLoss("loss", [("logprobs", 1)], b"x" * 20_000)
    made = [await server.create(user_metadata={}) for _ in range(3)]
    before = await server.stored()
    answered = []
    for number in range(6):
        operation = await losses.create("me", made[number % 3], number, loss)
        server.operations.on_answer(messages.Done(operation.request_id, messages.Nothing()))
        await operation.finished.wait()
        answered.append(operation)
        if await server.stored() >= 100_000:
            break
    with pytest.raises(QuotaExceeded):
        await losses.create("me", made[0], 9, loss)
    assert await losses.create("me", made[0], 0, loss) is answered[0], "the first one, submitted again"
    for session_id in made:
        await server.sessions.finish("me", session_id, "success", None)
    assert await server.stored() <= before
    assert await losses.create("me", await server.create(user_metadata={}), 0, loss)


async def test_sessions_that_are_silent_for_a_week_are_over_when_room_is_needed(server: Server) -> None:
    made = await fill(server)
    week = 8 * 24 * 3600.0
    for session_id in made[:5]:
        await server.ledger.write(
            lambda connection, of=session_id: tenancy.heartbeat(connection, of, time.time() - week)
        )
    assert await server.create()
    with pytest.raises(NotFound):
        await server.sessions.find("me", made[0])
    assert await server.sessions.find("me", made[5])


@pytest.mark.parametrize(
    ("body", "fields", "named"),
    [
        (CreateSession, {"tags": ["x" * 257]}, "tags"),
        (CreateSession, {"tags": ["x"] * 257}, "tags"),
        (CreateSession, {"user_metadata": {"a": "x" * MOST_METADATA_BYTES}}, "user_metadata"),
        (CreateSession, {"user_metadata": {str(n): n for n in range(10_000)}}, "user_metadata"),
        (CreateSession, {"sdk_version": "x" * 1025}, "sdk_version"),
        (CreateSession, {"project_id": "x" * 1025}, "project_id"),
        (CreateSession, {"display_name": "x" * 1025}, "display_name"),
        (CreateModel, {"base_model": "m", "user_metadata": {"a": "é" * 40_000}}, "user_metadata"),
        (SaveWeights, {"path": "p", "user_metadata": {"a": "x" * MOST_METADATA_BYTES}}, "user_metadata"),
    ],
)
def test_metadata_of_one_object_is_limited(body: type, fields: dict, named: str) -> None:
    if body is CreateModel:
        fields = fields | {"session_id": "s", "model_seq_id": 0}
    with pytest.raises(ValidationError) as refused:
        body(**fields)
    assert {str(error["loc"][0]) for error in refused.value.errors()} == {named}


def test_metadata_of_a_usual_size_is_kept() -> None:
    usual = {"config": {"a": [1, 2.5, None, 2**63 - 1]}, "text": "ü" * 10_000}
    assert TypeAdapter(Metadata).validate_python(usual) == usual
    with pytest.raises(ValidationError, match="an integer beyond 64 bits"):  # no answer could have it
        TypeAdapter(Metadata).validate_python({"a": 2**70})
    assert FinishSession(detail="x" * 5000 + "the end").detail.endswith("the end")
    assert len(FinishSession(detail="x" * 5000).detail) == 4096
