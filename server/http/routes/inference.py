"""Inference servers beside this one: registered, listed, removed, and sent whole models.

This server is an inference server too: when it is registered with itself, it samples what it has trained, and
nothing has to be sent.
"""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request
from pydantic import ValidationError

from .... import __version__
from ....engine import messages
from ...addresses import is_loopback
from ...base_models import BaseModels
from ...errors import BadRequest, Gone, Unavailable
from ...ledger import plugins as plugin_rows
from ...ledger.ledger import Ledger
from ...models.runs import Runs
from ...plugins.sglang.endpoint import CannotServe
from ...plugins.sglang.endpoints import Endpoints, Registered, Registry
from ...plugins.sglang.merged_weights import Distribution, Synced
from ...settings import Settings
from ...wire import DEFAULT_MODEL, describe, requests, responses
from ..bodies import BodyRoute
from ..dependencies import Owner, Provided, described_as, provided
from ..sample_targets import SampleTargets

router = APIRouter(tags=["inference servers"], route_class=BodyRoute)


def _is_this_server(request: Request, host: str, port: int) -> bool:
    """Return whether the request came to this address, by whatever name of this machine."""
    own = request.url.port or (443 if request.url.scheme == "https" else 80)
    return port == own and (host == request.url.hostname or is_loopback(host))


def _shown(request: Request, owner: str, host: str, port: int, fields: dict[str, Any]) -> dict[str, Any]:
    """Describe a server that was registered with these fields, without its key."""
    shown = {"host": host, "port": port, "worker_port": None, "world_size": 1, "pool": "default"}
    shown |= {key: value for key, value in fields.items() if key in shown}
    if _is_this_server(request, host, port):
        model = next(iter(provided(request, BaseModels)), None)
        about = {"model_path": model, "served_model_name": model, "tp_size": 1, "version": __version__}
        about |= {"max_lora_rank": provided(request, Settings).max_rank}
        about |= {"enable_lora": True, "quantization": None}
        return shown | {"healthy": True, "server_info": about, "problem": None}
    shown |= _state(provided(request, Endpoints).find(owner, host, port))
    problem = provided(request, Registry).problems.get((owner, host, port))
    return shown if problem is None else shown | {"problem": problem}


def _state(endpoint: Registered | None) -> dict[str, Any]:
    """Describe the state of a server, with the part of its own description that clients may see."""
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


@router.post("/add_inference_endpoint", responses=described_as(responses.AddedEndpoint))
async def add_inference_endpoint(
    body: requests.AddEndpoint,
    request: Request,
    base_models: Provided[BaseModels],
    registry: Provided[Registry],
    owner: Owner,
) -> dict[str, Any]:
    """Register an SGLang server that `--sglang-allow` allows, that answers, and that has one of the base
    models."""
    if body.base_model is not None:
        base_models.named(body.base_model)
    here = _is_this_server(request, body.host, body.port)
    fields = body.model_dump(exclude={"host", "port"}) | {"is_this": here}
    problem = await registry.add(owner, body.host, body.port, fields)
    where = f"{body.host}:{body.port}"
    return {
        "success": problem is None,
        "message": problem or f"{where} is registered",
        "endpoint": _shown(request, owner, body.host, body.port, fields),
        "weights_synced": problem is None and here and body.sync_weights,
        "sync_message": None if here or not body.sync_weights else "sync_inference_weights brings them",
    }


@router.post("/remove_inference_endpoint", responses=described_as(responses.Outcome))
async def remove_inference_endpoint(
    body: requests.Endpoint, registry: Provided[Registry], owner: Owner
) -> dict[str, Any]:
    """Remove an SGLang server that this tenant has added."""
    gone = await registry.remove(owner, body.host, body.port)
    where = f"{body.host}:{body.port}"
    return {"success": gone, "message": f"{where} is forgotten" if gone else f"{where} is not there"}


@router.get("/list_inference_endpoints", responses=described_as(responses.InferenceEndpoints))
async def list_inference_endpoints(
    request: Request, ledger: Provided[Ledger], endpoints: Provided[Endpoints], owner: Owner
) -> dict[str, Any]:
    """List the caller's servers. Of the operator's, which serve everybody, only the numbers are shown."""
    known = await ledger.read(plugin_rows.endpoints, owner)
    shown = [_shown(request, owner, row.host, row.port, row.fields) for row in known]
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
    """Answer 410 to routes of old clients that no server has any more, and name the ones to use."""
    raise Gone(f"{request.url.path} is no more: {_INSTEAD[request.url.path]}")


@router.post("/sync_inference_weights", responses=described_as(responses.SyncedWeights))
@router.post("/api/v1/sync_inference_weights", responses=described_as(responses.SyncedWeights))
async def sync_inference_weights(
    body: requests.SyncWeights,
    request: Request,
    ledger: Provided[Ledger],
    runs: Provided[Runs],
    distribution: Provided[Distribution],
    targets: Provided[SampleTargets],
    owner: Owner,
) -> dict[str, Any]:
    """Replace the weights of the caller's inference servers by full weights; answer when they have them.

    The weights are those of a model as it is now, or of `model_path`, with an adapter merged into its base
    model, or with `base_model` alone that model's own. All servers of these `pools` get them, or none. A
    sequence has the weights of one version: samples under way are waited for, or, with `pause_mode` abort,
    drawn anew. The cache of prefixes is flushed.
    """
    began = time.perf_counter()
    if body.model_id is not None:
        await runs.find(owner, body.model_id)
    known = await ledger.read(plugin_rows.endpoints, owner)
    own = [
        _synced(row.host, row.port, None, "it samples what is trained here")
        for row in known
        if (body.pools is None or row.fields.get("pool") in body.pools)
        and _is_this_server(request, row.host, row.port)
    ]
    servers = distribution.own(owner, body.pools)
    away = [each for each in servers if not each.reachable]
    if away or not servers:
        outcomes = own + [_synced(each.host, each.port, _reason(each)) for each in servers]
        return _answer(body, outcomes, "nothing had to be sent" if own and not servers else None)
    sampler = await _sampler(body, targets, owner)
    chosen = body.quantization
    if chosen is None:
        chosen = await ledger.read(plugin_rows.quantization, owner)
    fp8 = _fp8(chosen)
    of_model = [each for each in servers if each.base_model == sampler.base_model]
    saved = time.perf_counter()
    try:
        synced = await distribution.merged.sync(
            sampler, of_model, fp8=fp8, version=body.weight_version, abort=body.pause_mode == "abort"
        )
    except CannotServe as error:
        raise Unavailable(error.message) from None
    outcomes = own + [
        _synced(each.endpoint.host, each.endpoint.port, each.problem, synced.version, **each.seconds)
        for each in synced.pushed
    ]
    answer = _answer(body, outcomes, None if outcomes else f"no server of {sampler.base_model!r} is named")
    return answer | _measured(synced, saved - began)


@router.post("/api/v1/set_sync_quantization", responses=described_as(responses.SyncQuantization))
async def set_sync_quantization(
    body: requests.SetQuantization, ledger: Provided[Ledger], owner: Owner
) -> dict[str, Any]:
    """Set the format for all later syncs that do not name one."""
    chosen = _normalised(body.quantization) if body.quantization else None
    await ledger.write(plugin_rows.set_quantization, owner, chosen)
    message = "weights go out as they are" if chosen is None else f"weights go out as {chosen['fmt']}"
    return {"quantization": chosen, "message": message}


async def _sampler(body: requests.SyncWeights, targets: SampleTargets, owner: str) -> messages.SamplerRef:
    """Find the weights to send."""
    if body.model_path is not None:
        found = await targets.weights(owner, body.base_model, body.model_path, body.model_id)
        return messages.SamplerRef(found.base_model, found.directory)
    if body.base_model is not None and body.model_id is None:
        return messages.SamplerRef(targets.base_models.named(body.base_model).name)
    live = await targets.live_sampler(owner, body.model_id or DEFAULT_MODEL)
    return messages.SamplerRef(live.base_model, live.directory)


def _reason(endpoint: Registered) -> str:
    if not endpoint.reachable:
        return f"it cannot be reached: {endpoint.problem}"
    return "another server cannot be reached; nothing was sent"


def _synced(host: str, port: int, problem: str | None, message: str = "", **seconds: float) -> dict[str, Any]:
    shown = {"host": host, "port": port, "success": problem is None, "message": problem or message}
    return shown | {"seconds": {name: round(value, 4) for name, value in seconds.items()}}


def _answer(
    body: requests.SyncWeights, outcomes: list[dict[str, Any]], message: str | None
) -> dict[str, Any]:
    success = bool(outcomes) and all(each["success"] for each in outcomes)
    problems = [each["message"] for each in outcomes if not each["success"]]
    return {
        "success": success,
        "message": message or (problems[0] if problems else "" if outcomes else "no server is named"),
        "transfer_time": 0.0,
        "total_bytes": 0,
        "num_parameters": 0,
        "num_buckets": 0,
        "timing_breakdown": {},
        "endpoints_synced": outcomes,
        "cache_invalidation_mode": "flush",
        "flush_cache": True,
        "pause_mode": "abort" if body.pause_mode == "abort" else "wait",
    }


def _measured(synced: Synced, saving: float) -> dict[str, Any]:
    return {
        "transfer_time": synced.seconds["push"],
        "total_bytes": synced.export.bytes,
        "num_parameters": synced.export.parameters,
        "num_buckets": synced.export.files,
        "timing_breakdown": {"save": saving} | synced.seconds,
        "weight_version": synced.version,
    }


def _fp8(chosen: dict[str, Any] | None) -> messages.Fp8 | None:
    """Return the format of a sync as the engine's message has it. Raises BadRequest."""
    normalised = _normalised(chosen) if chosen else None
    if normalised is None:
        return None
    block = normalised["weight_block_size"]
    return messages.Fp8(block and (block[0], block[1]), normalised["modules_to_not_convert"])


def _normalised(given: dict[str, Any]) -> dict[str, Any] | None:
    """Check a format and return it with its defaults; None sends weights as they are. Raises BadRequest."""
    try:
        chosen = requests.Quantization.model_validate(given)
    except ValidationError as error:
        raise BadRequest(f"quantization: {describe([*map(dict, error.errors())])}") from None
    if chosen.quant_method == "none":
        return None
    size = chosen.weight_block_size
    block = size if size is None else [size, size] if isinstance(size, int) else list(size)
    return chosen.model_dump() | {"weight_block_size": block}
