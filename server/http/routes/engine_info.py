"""What clients of inference servers ask before they sample."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from .... import __version__
from ...base_models import BaseModels
from ...settings import Settings
from ...wire import inference
from ..dependencies import Owner, described_as
from ..provided import Provided
from ..sample_targets import ServedModels

router = APIRouter(tags=["inference"])


@router.get("/v1/models", responses=described_as(inference.ServedModels))
async def models(
    base_models: Provided[BaseModels], served_models: Provided[ServedModels], owner: Owner
) -> dict[str, Any]:
    """The base models, and the caller's samplers of named weights: by path, each an adapter of its base."""
    data = [_model(base.name, None, base.max_sequence_length, 0.0) for base in base_models.values()]
    paths = set()
    for row in await served_models.listed(owner):
        base = base_models.get(row.base_model)
        if base is not None and row.model_path not in paths:
            paths.add(row.model_path)
            data.append(_model(row.model_path, base.name, base.max_sequence_length, row.created_at))
    return {"object": "list", "data": data}


@router.get("/v1/models/{name:path}", responses=described_as(inference.ServedModel))
async def model(
    name: str, base_models: Provided[BaseModels], served_models: Provided[ServedModels], owner: Owner
) -> dict[str, Any]:
    """Any model that completions take, by whatever name they take it."""
    found = await served_models.describe(owner, name)
    base = base_models.named(found.parent or found.name)
    return _model(found.name, found.parent, base.max_sequence_length, found.created)


def _model(name: str, parent: str | None, max_length: int, created: float) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": int(created),
        "owned_by": "tinsmith",
        "root": parent or name,
        "parent": parent,
        "max_model_len": max_length,
    }


@router.get("/model_info", responses=described_as(inference.ServedModelInfo))
@router.get("/get_model_info", responses=described_as(inference.ServedModelInfo))
async def model_info(base_models: Provided[BaseModels], _owner: Owner) -> dict[str, Any]:
    """Of the first base model. No path of this machine is in it: where there is no hub id, the name."""
    name = _first(base_models)
    return {
        "model_path": name,
        "tokenizer_path": name,
        "is_generation": True,
        "preferred_sampling_params": None,
        "weight_version": "default",
    }


@router.get("/server_info", responses=described_as(inference.ServerInfo))
@router.get("/get_server_info", responses=described_as(inference.ServerInfo))
async def server_info(
    settings: Provided[Settings], base_models: Provided[BaseModels], _owner: Owner
) -> dict[str, Any]:
    name = _first(base_models)
    return {
        "model_path": name,
        "served_model_name": next(iter(base_models)),
        "tp_size": settings.mesh.get("tensor", 1) if settings.mesh else 1,
        "dtype": settings.dtype,
        "quantization": None,
        "kv_cache_dtype": "auto",
        "enable_lora": True,
        "max_lora_rank": settings.max_rank,
        "version": __version__,
    }


def _first(base_models: BaseModels) -> str:
    base = next(iter(base_models.values()))
    return base.hub_id or base.name
