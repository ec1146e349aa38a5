"""API keys about themselves, and the tokens that they are exchanged for."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from ...access.keys import ApiKeys
from ...access.tokens import Claims, Tokens
from ...errors import Forbidden
from ...ledger import accounts
from ...ledger.ledger import Ledger
from ...wire import responses
from ..dependencies import CallerOf, described_as
from ..provided import Provided

router = APIRouter(prefix="/api/v1/auth", tags=["credentials"])


@router.post("/token", responses=described_as(responses.Token))
async def exchange(tokens: Provided[Tokens], caller: CallerOf) -> dict[str, str]:
    """A token for the caller's key. One for a token is that token: nobody who found one can renew it."""
    if caller.token is not None:
        return {"jwt": caller.token}
    assert caller.key is not None  # no URL of this route is signed
    return {"jwt": tokens.issue(Claims(caller.owner, caller.key.id))}


@router.get("/apikey/me", responses=described_as(responses.KeyInfo))
async def api_key(caller: CallerOf) -> dict[str, Any]:
    """What the SDK's `auth login` keeps beside the key. Its `name` is what `tinsmith keys revoke` takes; this
    server knows no e-mail addresses, and gives the tenant's name instead."""
    key = caller.key
    assert key is not None
    return {
        "key_id": int(key.id or "0", 16),
        "name": key.id or "none",
        "note": key.note,
        "details": {"org_details": {"name": caller.owner}, "user_details": {"email": caller.owner}},
    }


@router.delete("/apikey/me", responses=described_as(responses.Acknowledged))
async def revoke_api_key(
    keys: Provided[ApiKeys], ledger: Provided[Ledger], caller: CallerOf
) -> dict[str, str]:
    """The key that the request was sent with, and no other."""
    key = caller.key
    if caller.token is not None:
        raise Forbidden("a token cannot revoke its key; send the key itself")
    if key is None or not key.in_ledger:
        raise Forbidden("this key was given to the server at its start, and is taken away there")
    await ledger.write(lambda connection: accounts.revoke_key(connection, key.id))
    await keys.read(ledger)
    return {"status": "revoked"}
