"""Losses that clients trace and upload."""

from __future__ import annotations

from fastapi import APIRouter

from ...wire import responses
from ...wire.custom_loss import CreateCustomLoss
from ..bodies import BodyRoute
from ..dependencies import BackendOf, Owner, described_as, future

router = APIRouter(prefix="/api/v1", tags=["training"], route_class=BodyRoute)


@router.post("/create_custom_loss", responses=described_as(responses.Future))
async def create_custom_loss(body: CreateCustomLoss, backend: BackendOf, owner: Owner) -> dict[str, str]:
    session_id = await backend.sessions.require_active(owner, body.session_id)
    loss, seq_id = body.message(), body.custom_loss_seq_id
    with backend.admission.operation(owner, early=False) as accepted:
        operation = await backend.custom_losses.create(owner, session_id, seq_id, loss)
        accepted(operation)
    return future(operation)
