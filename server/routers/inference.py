"""Inference servers beside this one: named, listed, forgotten. Weights are not sent to them yet.

Nothing here asks another machine anything. This server is an inference server too: named as one, it samples
what it has trained, and there is nothing to send.
"""

from __future__ import annotations

import ipaddress
from typing import Any

from fastapi import APIRouter, Request
from pydantic import ValidationError
from sqlalchemy import Row

from ... import __version__
from ..errors import BadRequest, Gone, describe
from ..ledger import inference as rows
from ..wire import inference as wire
from . import Backend, BackendOf, Owner

router = APIRouter(tags=["inference servers"])

MAX_ENDPOINTS = 64  # of a tenant
_NOT_YET = "this server does not send weights to others yet; add its own address to sample from it"


def _is_this(request: Request, host: str, port: int) -> bool:
    """Whether it is the address that the request came to, by whatever name of this machine."""
    own = request.url.port or (443 if request.url.scheme == "https" else 80)
    return port == own and (host == request.url.hostname or _is_local(host))


def _is_local(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _shown(
    request: Request, backend: Backend, host: str, port: int, fields: dict[str, Any]
) -> dict[str, Any]:
    """`healthy` is only known of this server itself; of others it is null."""
    own = _is_this(request, host, port)
    model = next(iter(backend.base_models), None)
    about = {"model_path": model, "served_model_name": model, "tp_size": 1, "version": __version__}
    about |= {"enable_lora": True, "max_lora_rank": backend.settings.max_rank, "quantization": None}
    endpoint = {"host": host, "port": port, "worker_port": None, "world_size": 1, "pool": "default"}
    endpoint |= {key: value for key, value in fields.items() if key in endpoint}
    return endpoint | {"healthy": True if own else None, "server_info": about if own else None}


@router.post("/add_inference_endpoint")
async def add_inference_endpoint(
    body: wire.AddEndpoint, request: Request, backend: BackendOf, owner: Owner
) -> dict[str, Any]:
    fields = body.model_dump(exclude={"host", "port"})
    added = await backend.ledger.write(
        lambda connection: rows.add(connection, owner, body.host, body.port, fields, MAX_ENDPOINTS)
    )
    where, own = f"{body.host}:{body.port}", _is_this(request, body.host, body.port)
    message = f"{where} is noted" if own else f"{where} is noted; {_NOT_YET}"
    if not added:
        message = f"{where} is there already, or {MAX_ENDPOINTS} others are"
    return {
        "success": added,
        "message": message,
        "endpoint": _shown(request, backend, body.host, body.port, fields) if added else None,
        "weights_synced": added and own and body.sync_weights,
        "sync_message": None if own or not body.sync_weights else _NOT_YET,
    }


@router.post("/remove_inference_endpoint")
async def remove_inference_endpoint(body: wire.Endpoint, backend: BackendOf, owner: Owner) -> dict[str, Any]:
    gone = await backend.ledger.write(lambda connection: rows.remove(connection, owner, body.host, body.port))
    where = f"{body.host}:{body.port}"
    return {"success": gone, "message": f"{where} is forgotten" if gone else f"{where} is not there"}


@router.get("/list_inference_endpoints")
async def list_inference_endpoints(request: Request, backend: BackendOf, owner: Owner) -> dict[str, Any]:
    known = await backend.ledger.read(lambda connection: rows.endpoints(connection, owner))
    shown = [_shown(request, backend, row.host, row.port, row.fields) for row in known]
    return {"endpoints": shown, "count": len(shown)}


@router.post("/sync_inference_weights")
@router.post("/api/v1/sync_inference_weights")
async def sync_inference_weights(
    body: wire.SyncWeights, request: Request, backend: BackendOf, owner: Owner
) -> dict[str, Any]:
    """Succeeds where there is nothing to send: every server that was named is this one."""
    if body.model_id is not None:
        await backend.runs.find(owner, body.model_id)
    if body.quantization is not None:
        _quantization(body.quantization)
    known = await backend.ledger.read(lambda connection: rows.endpoints(connection, owner))
    pools = body.pools
    asked: list[Row] = [row for row in known if pools is None or row.fields.get("pool") in pools]
    synced = []
    for row in asked:
        own = _is_this(request, row.host, row.port)
        synced.append(
            {
                "host": row.host,
                "port": row.port,
                "success": own,
                "message": "it samples what is trained here" if own else _NOT_YET,
            }
        )
    success = bool(synced) and all(each["success"] for each in synced)
    return {
        "success": success,
        "message": "nothing had to be sent" if success else (_NOT_YET if synced else "no server is named"),
        "transfer_time": 0.0,
        "total_bytes": 0,
        "num_parameters": 0,
        "num_buckets": 0,
        "timing_breakdown": {},
        "endpoints_synced": synced,
    }


@router.post("/api/v1/set_sync_quantization")
async def set_sync_quantization(
    body: wire.SetQuantization, backend: BackendOf, owner: Owner
) -> dict[str, Any]:
    """Kept for the weights that will be sent to other servers."""
    chosen = _quantization(body.quantization) if body.quantization else None
    await backend.ledger.write(lambda connection: rows.set_quantization(connection, owner, chosen))
    message = "weights go out as they are" if chosen is None else f"weights go out as {chosen['fmt']}"
    return {"quantization": chosen, "message": f"{message}; {_NOT_YET}"}


def _quantization(given: dict[str, Any]) -> dict[str, Any] | None:
    """Normalised. Raises BadRequest."""
    try:
        chosen = wire.Quantization.model_validate(given)
    except ValidationError as error:
        raise BadRequest(f"quantization: {describe([*map(dict, error.errors())])}") from None
    if chosen.quant_method == "none":
        return None
    size = chosen.weight_block_size
    block = [size, size] if isinstance(size, int) else list(size)
    return chosen.model_dump() | {"weight_block_size": block}


_INSTEAD = {
    "/connect_inference_endpoint": "use /add_inference_endpoint",
    "/disconnect_inference_endpoint": "use /remove_inference_endpoint",
    "/api/v1/save_full_weights_safetensors": "use /api/v1/save_weights_external, and download the files",
    "/api/v1/update_dedicated_endpoint": "use /api/v1/save_weights_for_sampler",
    "/api/v1/update_serverless_weights": "use /api/v1/save_weights_for_sampler",
}


@router.post("/connect_inference_endpoint")
@router.post("/disconnect_inference_endpoint")
@router.post("/api/v1/save_full_weights_safetensors")
@router.post("/api/v1/update_dedicated_endpoint")
@router.post("/api/v1/update_serverless_weights")
async def gone(request: Request, _owner: Owner) -> dict[str, Any]:
    """What old clients ask and no server has any more: 410, with what to use."""
    raise Gone(f"{request.url.path} is no more: {_INSTEAD[request.url.path]}")
