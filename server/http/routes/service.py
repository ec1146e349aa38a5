"""The server itself: its configuration and health, the base models that it serves, and the engine's sleep."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from typing import Any

import orjson
import prometheus_client
from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response

from .... import __version__
from ....engine import messages
from ...base_models import BaseModels
from ...checkpoints.sweep import Sweep
from ...errors import Forbidden, Unavailable
from ...files import Disk
from ...models.runs import Runs
from ...operations.operations import Operations
from ...plugins.rlve import environments
from ...settings import Settings
from ...supervision.supervisor import Supervisor
from ...wire import responses
from ..dependencies import BaseUrl, Owner, Provided, described_as
from ..gate import METRICS_PATH
from ..monitoring import Metrics
from ..sample_targets import SampleTargets

router = APIRouter(tags=["service"])

# Some make older SDKs speak the protobuf wire; newer ones ignore them.
CLIENT_CONFIG = {
    "parallel_fwdbwd_chunks": True,
    "proto_compress_fwdbwd": False,
    "proto_write_fwdbwd": True,
    "fwd_via_fwdbwd": True,
    "create_model_via_load_weights": True,
    # Samples are waited for with one poll of their session, not with one each.
    "sample_use_retrieve_futures": True,
    # Copies of a sampling client get their numbers from the server.
    "sample_join_sampling_session": True,
}


@router.post("/api/v1/client/config", responses=described_as(responses.ClientConfig))
async def client_config(settings: Provided[Settings], _owner: Owner) -> dict[str, Any]:
    """Tell the SDK which parts of its protocol it may use with this server."""
    return CLIENT_CONFIG | {
        "pjwt_auth_enabled": settings.token_exchange,
        "custom_loss_server_side": settings.custom_loss_server_side,
    }


@router.post("/api/v1/client/dynamic_config", responses=described_as(responses.DynamicClientConfig))
async def dynamic_config(_owner: Owner) -> dict[str, Any]:
    """Tell the SDK what it may change while it runs, and when to ask again."""
    return {"refresh_interval_sec": 300, "sample_cancel_enabled": True, "sample_cancel_max_batch_size": 64}


@router.get("/api/v1/capabilities", responses=described_as(responses.Capabilities))
@router.get("/api/v1/get_server_capabilities", responses=described_as(responses.Capabilities))
async def capabilities(
    settings: Provided[Settings], base_models: Provided[BaseModels], _owner: Owner
) -> dict[str, Any]:
    """List the base models, with their limits, and what can be done with them."""
    return {
        "supported_models": [
            {
                "model_name": model.name,
                "max_context_length": model.max_sequence_length,
                "trainable": True,
                "sampleable": True,
                "supports_lora": True,
            }
            for model in base_models.values()
        ],
        "model_names": list(base_models),
        "max_batch_size": settings.max_datums,
        "features": ["lora", "gradient_accumulation", "checkpointing", "sampling"]
        + (["full_weight"] if settings.full_weight else [])
        + (["rlve"] if environments.installed() else []),
        "version": __version__,
    }


@router.get("/healthz", responses=described_as(responses.Healthz))
@router.get("/api/v1/healthz", responses=described_as(responses.Healthz))
async def healthz() -> dict[str, str]:
    """Answer 200 while the server is running; `/health` describes the engine too."""
    return {"status": "ok"}


@router.get("/", responses=described_as(responses.Directory))
async def root(base: BaseUrl, _owner: Owner) -> dict[str, Any]:
    """Say what this server is, and where its documentation and main routes are."""
    return {
        "name": "Tinsmith",
        "version": __version__,
        "architecture": "one server process, one engine process",
        "docs": f"{base}/docs",
        "health": f"{base}/health",
        "endpoints": {
            "training": f"{base}/api/v1/forward_backward",
            "sampling": f"{base}/api/v1/asample",
            "openapi": f"{base}/openapi.json",
        },
    }


_HEALTH = described_as(responses.Health)
_HEALTH[503] = {"description": "the engine cannot start", **_HEALTH[200]}


@router.get("/health", responses=_HEALTH)
@router.get("/api/v1/health", responses=_HEALTH)
async def health(
    request: Request,
    disk: Provided[Disk],
    engine: Provided[Supervisor],
    operations: Provided[Operations],
    runs: Provided[Runs],
    sweep: Provided[Sweep],
) -> Response:
    """Describe the server and its engine: with 200 while the engine lives, loads or is started again, with
    503 when it seems that it cannot start. Callers that send a key get the ids of their models too."""
    dead = engine.death is not None
    resident, waiting = runs.resident(), len(operations.unanswered())
    owner = getattr(request.state, "owner", None)
    body = {
        "status": "unhealthy" if dead else "healthy",
        "version": __version__,
        "timestamp": datetime.now(UTC).isoformat(),
        "engine_running": engine.alive,
        "active_requests": waiting,
        "total_requests": operations.accepted,
        "futures_count": waiting,
        "active_models": len(resident),
        "active_training_clients": len(resident),
        "active_sessions": len({run.session_id for run in resident}),
        "model_ids": [run.name for run in resident if run.owner == owner and run.state != "finished"],
        "ray_status": "not_used",
        "ray_initialized": False,
        "engine": {
            "phase": engine.phase,
            "text": engine.text,
            "ready": engine.ready.is_set(),
            "lives": engine.life,
        },
        "memory": _memory(engine.memory),
        "disk": _disk(disk, sweep),
    }
    return Response(orjson.dumps(body), 503 if dead else 200, media_type="application/json")


def _memory(memory: messages.Memory | None) -> dict[str, Any] | None:
    """Describe the memory of each device as the engine reported it last; None before it has."""
    if memory is None:
        return None
    return {
        "capacity_bytes": memory.capacity,
        "planned_bytes": memory.planned,
        "held_bytes": memory.held,
        "free_bytes": memory.free,
        "waiting_in_host_memory_bytes": memory.waiting,
    }


def _disk(disk: Disk, sweep: Sweep) -> dict[str, Any]:
    """Describe the data directory's disk. `full`: submits are answered 507; `used_bytes`: as of the last
    sweep."""
    reserve = disk.reserve_bytes
    try:
        total, free = disk.usage()
    except OSError as error:
        return {"error": str(error)}
    return {
        "total_bytes": total,
        "free_bytes": free,
        "reserve_bytes": reserve,
        "full": free < reserve,
        "used_bytes": sweep.used_bytes,
    }


@router.post("/api/v1/telemetry", responses=described_as(responses.Acknowledged))
async def telemetry(_owner: Owner) -> dict[str, str]:
    """Accept the events that clients report about themselves; nothing is kept."""
    return {"status": "accepted"}


@router.get(METRICS_PATH, response_class=PlainTextResponse)
async def metrics(metrics: Provided[Metrics]) -> Response:
    """Return the metrics in Prometheus' text format."""
    return Response(
        prometheus_client.generate_latest(metrics.registry), media_type=prometheus_client.CONTENT_TYPE_LATEST
    )


engine_router = APIRouter(tags=["engine"])


@engine_router.post("/sleep", responses=described_as(responses.SleepAnswer))
async def sleep(
    engine: Provided[Supervisor], operations: Provided[Operations], runs: Provided[Runs], owner: Owner
) -> dict[str, Any]:
    """Move the engine's memory off the device, after the operations that wait. Any later operation wakes it.
    Refused while the engine works for another tenant."""
    others = {run.owner for run in runs.resident()} - {owner}
    if others or any(operation.owner != owner for operation in operations.unanswered()):
        raise Forbidden("the engine works for other tenants too; it sleeps for one that has it alone")
    return await _ask(engine, messages.Sleep(f"sleep-{uuid.uuid4().hex}"), "sleeping", "offload_time")


@engine_router.post("/wake_up", responses=described_as(responses.SleepAnswer))
async def wake_up(engine: Provided[Supervisor], _owner: Owner) -> dict[str, Any]:
    """Wake the engine at once, rather than with the next operation."""
    return await _ask(engine, messages.WakeUp(f"wake-{uuid.uuid4().hex}"), "awake", "load_time")


async def _ask(
    engine: Supervisor, message: messages.Sleep | messages.WakeUp, status: str, time_key: str
) -> dict[str, Any]:
    engine.require_submits()
    answer = await engine.request(message)
    if isinstance(answer, messages.Failed):
        raise Unavailable(f"the engine could not: {answer.message}")
    slept = answer.output
    assert isinstance(slept, messages.Slept)
    result = {
        "status": status,
        time_key: slept.seconds,
        "execution_time": slept.seconds,
        "bytes": slept.bytes,
        "bytes_on_device": slept.bytes_on_device,
    }
    return {"success": True, "result": result}


served_router = APIRouter(tags=["inference"])


@served_router.get("/v1/models", responses=described_as(responses.ServedModels))
async def models(
    base_models: Provided[BaseModels], targets: Provided[SampleTargets], owner: Owner
) -> dict[str, Any]:
    """List the base models and the caller's samplers of named weights, each by its path and with its base
    model."""
    data = [_model(base.name, None, base.max_sequence_length, 0.0) for base in base_models.values()]
    paths = set()
    for row in await targets.listed(owner):
        base = base_models.get(row.base_model)
        if base is not None and row.model_path not in paths:
            paths.add(row.model_path)
            data.append(_model(row.model_path, base.name, base.max_sequence_length, row.created_at))
    return {"object": "list", "data": data}


@served_router.get("/v1/models/{name:path}", responses=described_as(responses.ServedModel))
async def model(
    name: str, base_models: Provided[BaseModels], targets: Provided[SampleTargets], owner: Owner
) -> dict[str, Any]:
    """Describe a model by any name that a request for completions may give it."""
    found = await targets.describe(owner, name)
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


@served_router.get("/model_info", responses=described_as(responses.ServedModelInfo))
@served_router.get("/get_model_info", responses=described_as(responses.ServedModelInfo))
async def model_info(base_models: Provided[BaseModels], _owner: Owner) -> dict[str, Any]:
    """Describe the first base model, by its hub id or its name: no path of this machine is shown."""
    name = _first(base_models)
    return {
        "model_path": name,
        "tokenizer_path": name,
        "is_generation": True,
        "preferred_sampling_params": None,
        "weight_version": "default",
    }


@served_router.get("/server_info", responses=described_as(responses.ServerInfo))
@served_router.get("/get_server_info", responses=described_as(responses.ServerInfo))
async def server_info(
    settings: Provided[Settings], base_models: Provided[BaseModels], _owner: Owner
) -> dict[str, Any]:
    """Describe the server as SGLang does, without paths of this machine."""
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
