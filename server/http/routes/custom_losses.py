"""Losses that clients trace and upload."""

from __future__ import annotations

from fastapi import APIRouter

from ...models.admission import Admission
from ...models.custom_losses import CustomLosses
from ...models.sessions import Sessions
from ...wire import responses
from ...wire.requests import CreateCustomLoss
from ..bodies import BodyRoute
from ..dependencies import Owner, described_as, future
from ..provided import Provided

router = APIRouter(prefix="/api/v1", tags=["training"], route_class=BodyRoute)


@router.post("/create_custom_loss", responses=described_as(responses.Future))
async def create_custom_loss(
    body: CreateCustomLoss,
    admission: Provided[Admission],
    custom_losses: Provided[CustomLosses],
    sessions: Provided[Sessions],
    owner: Owner,
) -> dict[str, str]:
    session_id = await sessions.require_active(owner, body.session_id)
    loss, seq_id = body.message(), body.custom_loss_seq_id
    with admission.operation(owner, early=False) as accepted:
        operation = await custom_losses.create(owner, session_id, seq_id, loss)
        accepted(operation)
    return future(operation)
