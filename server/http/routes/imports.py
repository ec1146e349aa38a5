"""Adapters of PEFT become checkpoints."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from ...base_models import BaseModels
from ...models.adapter_imports import AdapterImports
from ...wire import responses
from ..dependencies import Owner, described_as
from ..provided import Provided

PATH = "/api/v1/import_weights"
router = APIRouter(tags=["weights"])


@router.post(PATH, responses=described_as(responses.ImportedWeights))
async def import_weights(
    request: Request,
    base_models: Provided[BaseModels],
    adapter_imports: Provided[AdapterImports],
    owner: Owner,
    base_model: str,
    name: str = "imported",
    project_id: Annotated[str | None, Query(min_length=1, max_length=256)] = None,
) -> dict[str, Any]:
    """A folder that PEFT's `save_pretrained` wrote, as an uncompressed tar of up to `max_import_bytes`.

    Makes a training run of a session of its own, with a checkpoint to train on (`weights/<name>`) and one to
    sample from (`sampler_weights/<name>`), and answers when both are complete. 400 says why an adapter does
    not fit.
    """
    base_models.named(base_model)
    return await adapter_imports.make(owner, base_model, name, project_id, request.stream())
