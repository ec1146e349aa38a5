"""Checkpoints: listed, described, shared, deleted."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Header
from sqlalchemy import Row

from ....ckpt import paths
from ...checkpoints.checkpoints import Checkpoints, iso, named, parse, parse_short, shown
from ...checkpoints.copies import Copies, session_of
from ...errors import BadRequest, NotFound
from ...ledger import checkpoints as rows
from ...ledger import tenancy
from ...ledger.ledger import Ledger
from ...models.sessions import Sessions
from ...wire import requests, responses
from ...wire.body import OfModel
from ..bodies import BodyRoute
from ..dependencies import Limit, Offset, Owner, Said, described_as, xorl_name
from ..provided import Provided

router = APIRouter(prefix="/api/v1", tags=["checkpoints"], route_class=BodyRoute)

LISTED = 1000  # of a model, at most


@router.get("/checkpoints", responses=described_as(responses.CheckpointPage))
async def list_checkpoints(
    ledger: Provided[Ledger], owner: Owner, said: Said, limit: Limit = 100, offset: Offset = 0
) -> dict[str, Any]:
    page, total = await ledger.read(lambda connection: rows.of_owner(connection, owner, limit, offset))
    runs = await ledger.read(
        lambda connection: tenancy.models_by_id(connection, {row.run_id for row in page})
    )
    return {
        "checkpoints": [
            shown(row, xorl_name(runs[row.run_id], said) if row.run_id in runs else None) for row in page
        ],
        "cursor": {"offset": offset, "limit": limit, "total_count": total},
    }


@router.post("/list_checkpoints", responses=described_as(responses.Checkpoints))
async def list_checkpoints_of_model(body: OfModel, ledger: Provided[Ledger], owner: Owner) -> dict[str, Any]:
    """Those of all the caller's models of that name, newest first; of a model there is not, none."""
    found = await ledger.read(lambda connection: rows.of_name(connection, owner, body.model_id, LISTED))
    return {"checkpoints": [_listed(row, body.model_id) for row in found]}


def _listed(row: Row, model: str) -> dict[str, Any]:
    """Under the name by which the model was asked for."""
    return shown(row) | {
        "path": f"{paths.XORL_SCHEME}{model}/{row.segment}/{row.name}",
        "checkpoint_id": f"{row.segment}/{model}/{row.name}",
    }


@router.post("/delete_checkpoint", responses=described_as(responses.DeletedCheckpoint))
async def delete_named_checkpoint(
    body: requests.DeleteCheckpoint, checkpoints: Provided[Checkpoints], owner: Owner
) -> dict[str, Any]:
    uri = parse_short(body.checkpoint_id, body.model_id)
    await checkpoints.delete(owner, uri)
    path = f"{paths.XORL_SCHEME}{uri.run}/{uri.checkpoint_id}"
    return {"success": True, "deleted_path": path, "error": None}


@router.post("/weights_info", responses=described_as(responses.CheckpointInfo | responses.NoCheckpoint))
async def weights_info(
    body: requests.WeightsInfo, checkpoints: Provided[Checkpoints], owner: Owner
) -> dict[str, Any]:
    try:
        row = await checkpoints.find(owner, parse(body.path or body.tinker_path or ""))
    except NotFound:
        if body.path is None:
            raise
        return {"exists": False}
    lora = row.lora or {}
    info = {
        "exists": True,
        "base_model": row.base_model,
        "is_lora": row.lora is not None,
        "lora_rank": 0,  # as xorl-client asks for full weights when it goes on from a checkpoint
        "optimizer_config": row.optimizer,
        "created_at": iso(row.created_at),
        "size_bytes": row.size_bytes,
    }
    if row.lora is not None:
        info |= {"lora_rank": lora["rank"], "lora_alpha": lora["alpha"]}
        info |= {key: lora[key] for key in ("train_unembed", "train_mlp", "train_attn")}
        info["lora_config"] = lora | {"lora_rank": lora["rank"], "lora_alpha": lora["alpha"]}
    return info


@router.post("/copy_weights", responses=described_as(responses.CopiedWeights))
async def copy_weights(
    body: requests.CopyWeights,
    sessions: Provided[Sessions],
    checkpoints: Provided[Checkpoints],
    copies: Provided[Copies],
    owner: Owner,
    x_idempotency_key: Annotated[str | None, Header()] = None,
) -> dict[str, str]:
    """Of any kind; into a session, as a new run of it, or into a project, as a new session."""
    source = await checkpoints.find(owner, parse(body.source_path))
    session_id, number, project = body.session_id, body.model_seq_id, None
    if session_id is not None and number is not None:
        session_id = await sessions.require_active(owner, session_id)
    elif body.destination_project_id is not None:
        session_id, number = session_of(owner, x_idempotency_key), 0
        project = body.destination_project_id
    else:
        raise BadRequest("copy_weights: give destination_project_id, or session_id and model_seq_id")
    uri = await copies.copy(owner, source, session_id, number, project, body.ttl_seconds)
    return {"tinker_path": str(uri)}


_ONE = "/training_runs/{run_id}/checkpoints/{segment}/{name}"


@router.delete(_ONE, responses=described_as(responses.Acknowledged))
async def delete_checkpoint(
    run_id: str, segment: str, name: str, checkpoints: Provided[Checkpoints], owner: Owner
) -> dict[str, str]:
    await checkpoints.delete(owner, named(run_id, segment, name))
    return {"status": "deleted"}


@router.post(_ONE + "/publish", responses=described_as(responses.Acknowledged))
async def publish(
    run_id: str, segment: str, name: str, checkpoints: Provided[Checkpoints], owner: Owner
) -> dict[str, str]:
    await checkpoints.publish(owner, named(run_id, segment, name), True)
    return {"status": "published"}


@router.delete(_ONE + "/publish", responses=described_as(responses.Acknowledged))
async def unpublish(
    run_id: str, segment: str, name: str, checkpoints: Provided[Checkpoints], owner: Owner
) -> dict[str, str]:
    await checkpoints.publish(owner, named(run_id, segment, name), False)
    return {"status": "unpublished"}


@router.put(_ONE + "/ttl", responses=described_as(responses.Acknowledged))
async def set_ttl(
    run_id: str, segment: str, name: str, body: requests.Ttl, checkpoints: Provided[Checkpoints], owner: Owner
) -> dict[str, str]:
    await checkpoints.set_ttl(owner, named(run_id, segment, name), body.ttl_seconds)
    return {"status": "changed"}
