"""Inference servers beside this one: registered, listed, forgotten.

This server is an inference server too: named as one, it samples what it has trained, and there is nothing to
send.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from sqlalchemy import Row

from .... import __version__
from ...addresses import is_loopback
from ...base_models import BaseModels
from ...errors import Gone
from ...ledger import plugins as plugin_rows
from ...ledger.ledger import Ledger
from ...plugins.sglang.endpoints import Endpoints, Registered
from ...plugins.sglang.registry import Registry
from ...settings import Settings
from ...wire import inference
from ...wire import inference as wire
from ..bodies import BodyRoute
from ..dependencies import Owner, described_as
from ..provided import Provided

router = APIRouter(tags=["inference servers"], route_class=BodyRoute)


def is_this(request: Request, host: str, port: int) -> bool:
    """Whether it is the address that the request came to, by whatever name of this machine."""
    own = request.url.port or (443 if request.url.scheme == "https" else 80)
    return port == own and (host == request.url.hostname or is_loopback(host))


def _shown(
    request: Request,
    settings: Settings,
    base_models: BaseModels,
    endpoints: Endpoints,
    registry: Registry,
    owner: str,
    row: Row | wire.AddEndpoint,
) -> dict[str, Any]:
    """One that the caller has named, or wants to; never its key."""
    fields = row.model_dump() if isinstance(row, wire.AddEndpoint) else row.fields
    shown = {"host": row.host, "port": row.port, "worker_port": None, "world_size": 1, "pool": "default"}
    shown |= {key: value for key, value in fields.items() if key in shown}
    if is_this(request, row.host, row.port):
        return shown | {"healthy": True, "server_info": _of_this(settings, base_models), "problem": None}
    state = _state(endpoints.find(owner, row.host, row.port))
    problem = registry.problems.get((owner, row.host, row.port))
    return shown | state | ({} if problem is None else {"problem": problem})


def _of_this(settings: Settings, base_models: BaseModels) -> dict[str, Any]:
    model = next(iter(base_models), None)
    about = {"model_path": model, "served_model_name": model, "tp_size": 1, "version": __version__}
    return about | {"enable_lora": True, "max_lora_rank": settings.max_rank, "quantization": None}


def _state(endpoint: Registered | None) -> dict[str, Any]:
    """How it is, and what it says of itself, of which nothing else is told."""
    if endpoint is None:
        return {"healthy": False, "server_info": None, "problem": "it is not registered"}
    about = None
    if (limits := endpoint.limits) is not None:
        names = ("model_path", "tp_size", "quantization", "dtype", "enable_lora", "max_lora_rank", "version")
        about = {name: getattr(limits, name) for name in names}
        about |= {"served_model_name": limits.served_name, "context_length": limits.context_length}
    return {
        "healthy": endpoint.healthy,
        "server_info": about,
        "problem": endpoint.problem or None,
        "base_model": endpoint.base_model,
        "weight_version": endpoint.weight_version,
        "running": endpoint.running,
    }


@router.post("/add_inference_endpoint", responses=described_as(inference.AddedEndpoint))
async def add_inference_endpoint(
    body: wire.AddEndpoint,
    request: Request,
    settings: Provided[Settings],
    base_models: Provided[BaseModels],
    endpoints: Provided[Endpoints],
    registry: Provided[Registry],
    owner: Owner,
) -> dict[str, Any]:
    """Only of a server that may be asked (`--sglang-allow`), answers, and has one of the base models."""
    if body.base_model is not None:
        base_models.named(body.base_model)
    here = is_this(request, body.host, body.port)
    fields = body.model_dump(exclude={"host", "port"}) | {"is_this": here}
    problem = await registry.add(owner, body.host, body.port, fields)
    where = f"{body.host}:{body.port}"
    return {
        "success": problem is None,
        "message": problem or f"{where} is registered",
        "endpoint": _shown(request, settings, base_models, endpoints, registry, owner, body),
        "weights_synced": problem is None and here and body.sync_weights,
        "sync_message": None if here or not body.sync_weights else "sync_inference_weights brings them",
    }


@router.post("/remove_inference_endpoint", responses=described_as(inference.RemovedEndpoint))
async def remove_inference_endpoint(
    body: wire.Endpoint, registry: Provided[Registry], owner: Owner
) -> dict[str, Any]:
    gone = await registry.remove(owner, body.host, body.port)
    where = f"{body.host}:{body.port}"
    return {"success": gone, "message": f"{where} is forgotten" if gone else f"{where} is not there"}


@router.get("/list_inference_endpoints", responses=described_as(inference.InferenceEndpoints))
async def list_inference_endpoints(
    request: Request,
    settings: Provided[Settings],
    base_models: Provided[BaseModels],
    ledger: Provided[Ledger],
    endpoints: Provided[Endpoints],
    registry: Provided[Registry],
    owner: Owner,
) -> dict[str, Any]:
    """The caller's own; and how many of the operator's there are for everybody, and are healthy."""
    known = await ledger.read(lambda connection: plugin_rows.endpoints(connection, owner))
    shown = [_shown(request, settings, base_models, endpoints, registry, owner, row) for row in known]
    shared = [each for each in endpoints.all(None, owner) if each.owner is None]
    return {
        "endpoints": shown,
        "count": len(shown),
        "of_operator": {"count": len(shared), "healthy": sum(each.healthy for each in shared)},
    }


_INSTEAD = {
    "/connect_inference_endpoint": "use /add_inference_endpoint",
    "/disconnect_inference_endpoint": "use /remove_inference_endpoint",
    "/api/v1/save_full_weights_safetensors": "use /api/v1/save_weights_external, and download the files",
    "/api/v1/update_dedicated_endpoint": "use /api/v1/save_weights_for_sampler",
    "/api/v1/update_serverless_weights": "use /api/v1/save_weights_for_sampler",
}


@router.post("/connect_inference_endpoint", status_code=410)
@router.post("/disconnect_inference_endpoint", status_code=410)
@router.post("/api/v1/save_full_weights_safetensors", status_code=410)
@router.post("/api/v1/update_dedicated_endpoint", status_code=410)
@router.post("/api/v1/update_serverless_weights", status_code=410)
async def gone(request: Request, _owner: Owner) -> dict[str, Any]:
    """What old clients ask and no server has any more: 410, with what to use."""
    raise Gone(f"{request.url.path} is no more: {_INSTEAD[request.url.path]}")
