"""Training runs, which are the models of the past and the present, and their checkpoints."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from sqlalchemy import Row

from ...ckpt import paths
from ..checkpoints import as_strings, iso, shown
from ..errors import NotFound
from ..ledger import checkpoints as rows
from ..ledger import tenancy
from . import Backend, BackendOf, Limit, Offset, Owner

router = APIRouter(prefix="/api/v1", tags=["training runs"])


async def _training_run(backend: Backend, row: Row) -> dict[str, Any]:
    saved = await backend.ledger.read(lambda connection: rows.of_run(connection, row.id))
    last = {kind: next((shown(c) for c in saved if c.segment == kind), None) for kind in paths.SEGMENTS}
    return {
        "training_run_id": row.id,
        "base_model": row.base_model,
        "model_owner": row.owner,
        "is_lora": row.lora is not None,
        "lora_rank": None if row.lora is None else row.lora["rank"],
        "corrupted": row.state == "failed",
        "last_request_time": iso(row.last_request_at),
        "last_checkpoint": last["weights"],
        "last_sampler_checkpoint": last["sampler_weights"],
        "user_metadata": as_strings(row.user_metadata),
    }


@router.get("/training_runs")
async def training_runs(
    backend: BackendOf, owner: Owner, limit: Limit = 20, offset: Offset = 0
) -> dict[str, Any]:
    page, total = await backend.ledger.read(
        lambda connection: tenancy.list_models(connection, owner, limit, offset)
    )
    return {
        "training_runs": [await _training_run(backend, row) for row in page],
        "cursor": {"offset": offset, "limit": limit, "total_count": total},
    }


async def _run_row(backend: Backend, owner: str, run_id: str) -> Row:
    row = await backend.ledger.read(lambda connection: tenancy.find_model(connection, run_id))
    if row is None or row.owner != owner:
        raise NotFound(f"unknown training run {run_id!r}")
    return row


@router.get("/training_runs/{run_id}")
async def training_run(run_id: str, backend: BackendOf, owner: Owner) -> dict[str, Any]:
    return await _training_run(backend, await _run_row(backend, owner, run_id))


@router.get("/training_runs/{run_id}/checkpoints")
async def checkpoints_of_run(run_id: str, backend: BackendOf, owner: Owner) -> dict[str, Any]:
    await _run_row(backend, owner, run_id)
    found = await backend.ledger.read(lambda connection: rows.of_run(connection, run_id))
    return {"checkpoints": [shown(row) for row in found]}
