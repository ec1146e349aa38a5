"""Training that the server runs itself: stopped, and resumed. It begins with its model (`rlve_config` of
create_model), and get_info tells of it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from ...models.runs import Runs
from ...plugins.rlve.runs import RlveRuns
from ...wire import responses
from ...wire.body import OfModel
from ..bodies import BodyRoute
from ..dependencies import Owner, described_as
from ..provided import Provided

router = APIRouter(prefix="/api/v1", tags=["training"], route_class=BodyRoute)


@router.post("/stop_rlve", responses=described_as(responses.RlveModel))
async def stop_rlve(
    body: OfModel, runs: Provided[Runs], rlve: Provided[RlveRuns], owner: Owner
) -> dict[str, Any]:
    """A step that has begun to train is ended first; the client then has the model to itself."""
    run = await runs.find_trainable(owner, body.model_id)
    await rlve.stop(run)
    return {"model_id": run.name, "rlve": await rlve.described(run)}


@router.post("/resume_rlve", responses=described_as(responses.RlveModel))
async def resume_rlve(
    body: OfModel, runs: Provided[Runs], rlve: Provided[RlveRuns], owner: Owner
) -> dict[str, Any]:
    """Goes on after the last step that was counted, without gradients that were accumulated since."""
    run = await runs.find_trainable(owner, body.model_id)
    await rlve.resume(run)
    return {"model_id": run.name, "rlve": await rlve.described(run)}
