"""What a session's operations did when: a trace, behind a URL that needs no key."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import APIRouter
from fastapi.responses import Response

from ...access.tokens import UrlSigner
from ...ledger import operations as rows
from ...ledger.ledger import Ledger
from ...models.sessions import Sessions
from ...wire import responses
from ..dependencies import BaseUrl, Owner, described_as
from ..provided import Provided
from ..traces import chrome_trace

router = APIRouter(prefix="/api/v1/sessions/{session_id}", tags=["traces"])

_MOST_OPERATIONS = 50_000


@router.get("/trace_export", responses=described_as(responses.TraceReady | responses.TraceFailed))
async def trace_export(
    session_id: str,
    base: BaseUrl,
    signer: Provided[UrlSigner],
    ledger: Provided[Ledger],
    sessions: Provided[Sessions],
    owner: Owner,
) -> dict[str, Any]:
    """Clients ask until it is `ready` or `failed`; it is at once."""
    session_id = (await sessions.find(owner, session_id)).id
    if not await ledger.read(lambda connection: rows.has_operations(connection, session_id)):
        return {"status": "failed", "error": "the ledger has no operations of this session, or no more"}
    path = f"/api/v1/sessions/{session_id}/trace"
    signed = signer.sign(path, owner, "", signer.expiry())
    return {"status": "ready", "url": base + signed}


@router.get("/trace", responses=described_as(responses.Trace))
async def trace(
    session_id: str, ledger: Provided[Ledger], sessions: Provided[Sessions], owner: Owner
) -> Response:
    """Of the newest operations that the ledger has."""
    session_id = (await sessions.find(owner, session_id)).id

    body = await ledger.read(
        lambda connection: orjson.dumps(
            chrome_trace(session_id, rows.timeline(connection, session_id, _MOST_OPERATIONS))
        )
    )
    headers = {"Content-Disposition": f'attachment; filename="{session_id}.json"'}
    return Response(body, media_type="application/json", headers=headers)
