"""What clients ask of the server itself."""

from __future__ import annotations

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
from ...files import Disk
from ...models.runs import Runs
from ...operations.operations import Operations
from ...plugins.rlve import environments
from ...settings import Settings
from ...supervision.supervisor import Supervisor
from ...wire import responses
from ..authentication import METRICS_PATH
from ..dependencies import BaseUrl, Owner, described_as
from ..monitoring import Metrics
from ..provided import Provided

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
    settings = settings
    return CLIENT_CONFIG | {
        "pjwt_auth_enabled": settings.token_exchange,
        "custom_loss_server_side": settings.custom_loss_server_side,
    }


@router.post("/api/v1/client/dynamic_config", responses=described_as(responses.DynamicClientConfig))
async def dynamic_config(_owner: Owner) -> dict[str, Any]:
    return {"refresh_interval_sec": 300, "sample_cancel_enabled": True, "sample_cancel_max_batch_size": 64}


@router.get("/api/v1/capabilities", responses=described_as(responses.Capabilities))
@router.get("/api/v1/get_server_capabilities", responses=described_as(responses.Capabilities))
async def capabilities(
    settings: Provided[Settings], base_models: Provided[BaseModels], _owner: Owner
) -> dict[str, Any]:
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
    """Whether the server answers; `/health` says how the engine is."""
    return {"status": "ok"}


@router.get("/", responses=described_as(responses.Directory))
async def root(base: BaseUrl, _owner: Owner) -> dict[str, Any]:
    """What is here."""
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
    """200 while the engine lives, loads or is started again; 503 when it seems that it cannot start. The ids
    of one's models are told to those who send their key."""
    engine = engine
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
    """Of each device, as the engine reported it last; None before it has."""
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
    """Of the data directory. `full`: submits are answered 507; `used_bytes`: by kind, at the last sweep."""
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
    """Clients report their own events; nothing is kept."""
    return {"status": "accepted"}


@router.get(METRICS_PATH, response_class=PlainTextResponse)
async def metrics(metrics: Provided[Metrics]) -> Response:
    return Response(
        prometheus_client.generate_latest(metrics.registry),
        media_type=prometheus_client.CONTENT_TYPE_LATEST,
    )
