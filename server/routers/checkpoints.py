"""Checkpoints: listed, described, shared, deleted."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Header

from ..checkpoints import named, parse, shown
from ..copies import session_of
from ..errors import BadRequest
from ..ledger import checkpoints as rows
from ..wire import requests
from . import BackendOf, Limit, Offset, Owner

router = APIRouter(prefix="/api/v1", tags=["checkpoints"])


@router.get("/checkpoints")
async def list_checkpoints(
    backend: BackendOf, owner: Owner, limit: Limit = 100, offset: Offset = 0
) -> dict[str, Any]:
    page, total = await backend.ledger.read(
        lambda connection: rows.of_owner(connection, owner, limit, offset)
    )
    return {
        "checkpoints": [shown(row) for row in page],
        "cursor": {"offset": offset, "limit": limit, "total_count": total},
    }


@router.post("/weights_info")
async def weights_info(body: requests.WeightsInfo, backend: BackendOf, owner: Owner) -> dict[str, Any]:
    row = await backend.checkpoints.find(owner, parse(body.tinker_path))
    lora = row.lora or {}
    info = {"base_model": row.base_model, "is_lora": row.lora is not None, "optimizer_config": row.optimizer}
    if row.lora is not None:
        info |= {"lora_rank": lora["rank"], "lora_alpha": lora["alpha"]}
        info |= {key: lora[key] for key in ("train_unembed", "train_mlp", "train_attn")}
    return info


@router.post("/copy_weights")
async def copy_weights(
    body: requests.CopyWeights,
    backend: BackendOf,
    owner: Owner,
    x_idempotency_key: Annotated[str | None, Header()] = None,
) -> dict[str, str]:
    """Of any kind; into a session, as a new run of it, or into a project, as a new session."""
    source = await backend.checkpoints.find(owner, parse(body.source_path))
    session_id, number, project = body.session_id, body.model_seq_id, None
    if session_id is not None and number is not None:
        await backend.sessions.require_active(owner, session_id)
    elif body.destination_project_id is not None:
        session_id, number = session_of(owner, x_idempotency_key), 0
        project = body.destination_project_id
    else:
        raise BadRequest("copy_weights: give destination_project_id, or session_id and model_seq_id")
    uri = await backend.copies.copy(owner, source, session_id, number, project, body.ttl_seconds)
    return {"tinker_path": str(uri)}


_ONE = "/training_runs/{run_id}/checkpoints/{segment}/{name}"


@router.delete(_ONE)
async def delete_checkpoint(
    run_id: str, segment: str, name: str, backend: BackendOf, owner: Owner
) -> dict[str, str]:
    await backend.checkpoints.delete(owner, named(run_id, segment, name))
    return {"status": "deleted"}


@router.post(_ONE + "/publish")
async def publish(run_id: str, segment: str, name: str, backend: BackendOf, owner: Owner) -> dict[str, str]:
    await backend.checkpoints.publish(owner, named(run_id, segment, name), True)
    return {"status": "published"}


@router.delete(_ONE + "/publish")
async def unpublish(run_id: str, segment: str, name: str, backend: BackendOf, owner: Owner) -> dict[str, str]:
    await backend.checkpoints.publish(owner, named(run_id, segment, name), False)
    return {"status": "unpublished"}


@router.put(_ONE + "/ttl")
async def set_ttl(
    run_id: str, segment: str, name: str, body: requests.Ttl, backend: BackendOf, owner: Owner
) -> dict[str, str]:
    await backend.checkpoints.set_ttl(owner, named(run_id, segment, name), body.ttl_seconds)
    return {"status": "changed"}
