"""The engine gives up its device's memory, and takes it back."""

from __future__ import annotations

import uuid
from typing import Any

from fastapi import APIRouter

from ....engine import messages
from ...errors import Forbidden, Unavailable
from ...models.runs import Runs
from ...operations.operations import Operations
from ...supervision.supervisor import Supervisor
from ...wire import responses
from ..dependencies import Owner, described_as
from ..provided import Provided

router = APIRouter(tags=["engine"])


@router.post("/sleep", responses=described_as(responses.SleepAnswer))
async def sleep(
    engine: Provided[Supervisor], operations: Provided[Operations], runs: Provided[Runs], owner: Owner
) -> dict[str, Any]:
    """After what was asked before. What is asked while it sleeps wakes it, and is done. Refused while the
    engine has models of another tenant."""
    others = {run.owner for run in runs.resident()} - {owner}
    if others or any(operation.owner != owner for operation in operations.unanswered()):
        raise Forbidden("the engine works for other tenants too; it sleeps for one that has it alone")
    slept = await _ask(engine, messages.Sleep(f"sleep-{uuid.uuid4().hex}"))
    return _result("sleeping", "offload_time", slept)


@router.post("/wake_up", responses=described_as(responses.SleepAnswer))
async def wake_up(engine: Provided[Supervisor], _owner: Owner) -> dict[str, Any]:
    """At once, rather than with the next operation."""
    return _result("awake", "load_time", await _ask(engine, messages.WakeUp(f"wake-{uuid.uuid4().hex}")))


async def _ask(engine: Supervisor, message: messages.Sleep | messages.WakeUp) -> messages.Slept:
    engine.require_submits()
    answer = await engine.request(message)
    if isinstance(answer, messages.Done) and isinstance(answer.output, messages.Slept):
        return answer.output
    assert isinstance(answer, messages.Failed)
    raise Unavailable(f"the engine could not: {answer.message}")


def _result(status: str, time_key: str, slept: messages.Slept) -> dict[str, Any]:
    result = {
        "status": status,
        time_key: slept.seconds,
        "execution_time": slept.seconds,
        "bytes": slept.bytes,
        "bytes_on_device": slept.bytes_on_device,
    }
    return {"success": True, "result": result}
