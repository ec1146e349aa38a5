"""Sessions, searched."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from ...access.tokens import user_urn
from ...checkpoints.checkpoints import as_strings, iso
from ...ledger import session_rows as rows
from ...ledger.ledger import Ledger
from ...settings import Settings
from ...wire import requests as wire
from ...wire import responses
from ..bodies import BodyRoute
from ..dependencies import Owner, described_as
from ..provided import Provided

router = APIRouter(prefix="/api/v1", tags=["sessions"], route_class=BodyRoute)

# Heartbeats are written down once a minute.
_LEAST_ACTIVE_SECONDS = 180.0


@router.post("/sessions/search", responses=described_as(responses.FoundSessions))
async def search_sessions(
    body: wire.SearchSessions, settings: Provided[Settings], ledger: Provided[Ledger], owner: Owner
) -> dict[str, Any]:
    """Only one's own sessions, whoever's are asked for: nobody shares one."""
    since = rows.active_since(max(settings.session_idle_seconds, _LEAST_ACTIVE_SECONDS))
    if body.owner.type == "user" and not {owner, user_urn(owner)} & set(body.owner.owner_urns):
        return {"sessions": [], "next_cursor": None}
    wanted = rows.SessionFilter(
        owner,
        body.session_id,
        body.display_name,
        body.project_ids,
        body.user_metadata,
        None if body.statuses is None else [state for each in body.statuses for state in each.states()],
        since,
        None if body.cursor is None else body.cursor.last_session_id,
    )
    page, more = await ledger.read(lambda connection: rows.search(connection, wanted, body.limit))
    stored = await ledger.read(lambda connection: rows.stored(connection, [row.id for row in page]))
    found = []
    for row in page:
        count, size = stored.get(row.id, (0, 0))
        found.append(
            {
                "session_id": row.id,
                "created_at": iso(row.created_at),
                "owner": user_urn(row.owner),
                "project_id": row.project_id or rows.NO_PROJECT,
                "status": rows.state_of(row, since),
                "checkpoints_count": count,
                "checkpoint_storage_bytes": size,
                "display_name": row.display_name,
                "user_metadata": as_strings(row.user_metadata),
            }
        )
    last = {"last_created_at": iso(page[-1].created_at), "last_session_id": page[-1].id} if more else None
    return {"sessions": found, "next_cursor": last}
