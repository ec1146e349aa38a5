"""Training runs, which are the models of the past and the present, and their checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from fastapi import APIRouter
from sqlalchemy import Row

from ....ckpt import paths
from ...checkpoints.checkpoints import as_strings, iso, shown
from ...dialect import Dialect
from ...errors import NotFound
from ...ledger import checkpoints as rows
from ...ledger import tenancy
from ...ledger.ledger import Ledger
from ...wire import responses
from ..dependencies import Limit, Offset, Owner, Said, described_as, xorl_name
from ..provided import Provided

router = APIRouter(prefix="/api/v1", tags=["training runs"])


AccessScope = Literal["owned", "accessible"]
"""`accessible`: also others' runs of which a checkpoint is published, and of these no more than that."""


async def _training_run(ledger: Ledger, owner: str, row: Row, said: Dialect | None) -> dict[str, Any]:
    saved = await _checkpoints(ledger, owner, row)
    name = xorl_name(row, said)
    last = {
        kind: next((shown(each, name) for each in saved if each.segment == kind), None)
        for kind in paths.SEGMENTS
    }
    return {
        "training_run_id": name or row.id,
        "model_id": row.alias or row.id,
        "base_model": row.base_model,
        "model_owner": row.owner,
        "is_lora": row.lora is not None,
        "lora_rank": None if row.lora is None else row.lora["rank"],
        "corrupted": row.state == "failed",
        "last_request_time": iso(row.last_request_at),
        "last_checkpoint": last["weights"],
        "last_sampler_checkpoint": last["sampler_weights"],
        "user_metadata": as_strings(row.user_metadata) if row.owner == owner else None,
    }


async def _checkpoints(ledger: Ledger, owner: str, run: Row) -> Sequence[Row]:
    others = run.owner != owner
    return await ledger.read(lambda connection: rows.of_run(connection, run.id, published_only=others))


@router.get("/training_runs", responses=described_as(responses.TrainingRuns))
async def training_runs(
    ledger: Provided[Ledger],
    owner: Owner,
    said: Said,
    limit: Limit = 20,
    offset: Offset = 0,
    access_scope: AccessScope = "owned",
    project_id: str | None = None,
) -> dict[str, Any]:
    of = tenancy.models_of(owner)
    if access_scope == "accessible":
        of |= tenancy.models_among(rows.published_runs())
    if project_id is not None:
        # The names of projects are each tenant's own.
        of &= tenancy.models_of_project(project_id) & tenancy.models_of(owner)
    page, total = await ledger.read(lambda connection: tenancy.list_models(connection, of, limit, offset))
    return {
        "training_runs": [await _training_run(ledger, owner, row, said) for row in page],
        "cursor": {"offset": offset, "limit": limit, "total_count": total},
    }


async def _find(ledger: Ledger, owner: str, run_id: str, access_scope: AccessScope) -> Row:
    """Raises NotFound."""
    row = await ledger.read(lambda connection: tenancy.find_owned(connection, owner, run_id))
    if row is not None:
        return row
    row = await ledger.read(lambda connection: tenancy.find_model(connection, run_id))
    if row is not None and access_scope == "accessible" and await _checkpoints(ledger, owner, row):
        return row
    raise NotFound(f"unknown training run {run_id!r}")


@router.get("/training_runs/{run_id}", responses=described_as(responses.TrainingRun))
async def training_run(
    run_id: str, ledger: Provided[Ledger], owner: Owner, said: Said, access_scope: AccessScope = "owned"
) -> dict[str, Any]:
    return await _training_run(ledger, owner, await _find(ledger, owner, run_id, access_scope), said)


@router.get("/training_runs/{run_id}/checkpoints", responses=described_as(responses.Checkpoints))
async def checkpoints_of_run(
    run_id: str, ledger: Provided[Ledger], owner: Owner, said: Said
) -> dict[str, Any]:
    """All of one's own; of another's run the published ones."""
    run = await _find(ledger, owner, run_id, "accessible")
    name = xorl_name(run, said)
    return {"checkpoints": [shown(row, name) for row in await _checkpoints(ledger, owner, run)]}
