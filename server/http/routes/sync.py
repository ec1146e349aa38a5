"""Whole models go to inference servers: now, and in which format."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request
from pydantic import ValidationError

from ....engine import messages
from ...base_models import BaseModels
from ...errors import BadRequest, Unavailable
from ...ledger import plugins as plugin_rows
from ...ledger.ledger import Ledger
from ...models.runs import Runs
from ...plugins.sglang.distribution import Distribution
from ...plugins.sglang.endpoint import CannotServe
from ...plugins.sglang.endpoints import Registered
from ...plugins.sglang.merged_weights import Synced
from ...wire import inference
from ...wire import inference as wire
from ...wire.body import DEFAULT_MODEL, describe
from ..bodies import BodyRoute
from ..dependencies import Owner, described_as
from ..provided import Provided
from ..sample_targets import SampleTargets
from .inference import is_this

router = APIRouter(tags=["inference servers"], route_class=BodyRoute)


@router.post("/sync_inference_weights", responses=described_as(inference.SyncedWeights))
@router.post("/api/v1/sync_inference_weights", responses=described_as(inference.SyncedWeights))
async def sync_inference_weights(
    body: wire.SyncWeights,
    request: Request,
    base_models: Provided[BaseModels],
    ledger: Provided[Ledger],
    runs: Provided[Runs],
    distribution: Provided[Distribution],
    targets: Provided[SampleTargets],
    owner: Owner,
) -> dict[str, Any]:
    """Full weights, an adapter inside its base model's, in place of what the caller's servers have: those of
    a model now, or of `model_path`; of `base_model` alone: its own again. Answered when they are there.

    All servers of these `pools` get them, or none. A sequence has the weights of one version: samples under
    way there are waited for, or, with `pause_mode` abort, drawn anew. The cache of prefixes is flushed.
    """
    began = time.perf_counter()
    if body.model_id is not None:
        await runs.find(owner, body.model_id)
    known = await ledger.read(lambda connection: plugin_rows.endpoints(connection, owner))
    asked = [row for row in known if body.pools is None or row.fields.get("pool") in body.pools]
    own = [_said(row.host, row.port, None, _HERE) for row in asked if is_this(request, row.host, row.port)]
    servers = distribution.own(owner, body.pools)
    away = [each for each in servers if not each.reachable]
    if away or not servers:
        said = own + [_said(each.host, each.port, _reason(each)) for each in servers]
        return _answer(body, said, "nothing had to be sent" if own and not servers else None)
    sampler = await _sampler(body, base_models, targets, owner)
    fp8 = quantization(body.quantization) if body.quantization is not None else None
    if body.quantization is None:
        fp8 = quantization(await ledger.read(lambda connection: plugin_rows.quantization(connection, owner)))
    of_model = [each for each in servers if each.base_model == sampler.base_model]
    saved = time.perf_counter()
    try:
        synced = await distribution.merged.sync(
            sampler, of_model, fp8=fp8, version=body.weight_version, abort=body.pause_mode == "abort"
        )
    except CannotServe as error:
        raise Unavailable(error.message) from None
    said = own + [
        _said(each.endpoint.host, each.endpoint.port, each.problem, synced.version, **each.seconds)
        for each in synced.pushed
    ]
    answer = _answer(body, said, None if said else f"no server of {sampler.base_model!r} is named")
    return answer | _measured(synced, saved - began)


@router.post("/api/v1/set_sync_quantization", responses=described_as(inference.SyncQuantization))
async def set_sync_quantization(
    body: wire.SetQuantization, ledger: Provided[Ledger], owner: Owner
) -> dict[str, Any]:
    """Kept: for every sync that does not say its own."""
    chosen = _normalised(body.quantization) if body.quantization else None
    await ledger.write(lambda connection: plugin_rows.set_quantization(connection, owner, chosen))
    message = "weights go out as they are" if chosen is None else f"weights go out as {chosen['fmt']}"
    return {"quantization": chosen, "message": message}


_HERE = "it samples what is trained here"


async def _sampler(
    body: wire.SyncWeights, base_models: BaseModels, targets: SampleTargets, owner: str
) -> messages.SamplerRef:
    if body.model_path is not None:
        found = await targets.weights(owner, body.base_model, body.model_path, body.model_id)
        return messages.SamplerRef(found.base_model, found.directory)
    if body.base_model is not None and body.model_id is None:
        return messages.SamplerRef(base_models.named(body.base_model).name)
    live = await targets.live_sampler(owner, body.model_id or DEFAULT_MODEL)
    return messages.SamplerRef(live.base_model, live.directory)


def _reason(endpoint: Registered) -> str:
    if not endpoint.reachable:
        return f"it cannot be reached: {endpoint.problem}"
    return "another server cannot be reached; nothing was sent"


def _said(host: str, port: int, problem: str | None, message: str = "", **seconds: float) -> dict[str, Any]:
    shown = {"host": host, "port": port, "success": problem is None, "message": problem or message}
    return shown | {"seconds": {name: round(value, 4) for name, value in seconds.items()}}


def _answer(body: wire.SyncWeights, said: list[dict[str, Any]], message: str | None) -> dict[str, Any]:
    success = bool(said) and all(each["success"] for each in said)
    problems = [each["message"] for each in said if not each["success"]]
    return {
        "success": success,
        "message": message or (problems[0] if problems else "" if said else "no server is named"),
        "transfer_time": 0.0,
        "total_bytes": 0,
        "num_parameters": 0,
        "num_buckets": 0,
        "timing_breakdown": {},
        "endpoints_synced": said,
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


def quantization(chosen: dict[str, Any] | None) -> messages.Fp8 | None:
    """As the engine is told it. Raises BadRequest."""
    normalised = _normalised(chosen) if chosen else None
    if normalised is None:
        return None
    block = normalised["weight_block_size"]
    return messages.Fp8(block and (block[0], block[1]), normalised["modules_to_not_convert"])


def _normalised(given: dict[str, Any]) -> dict[str, Any] | None:
    """Raises BadRequest."""
    try:
        chosen = wire.Quantization.model_validate(given)
    except ValidationError as error:
        raise BadRequest(f"quantization: {describe([*map(dict, error.errors())])}") from None
    if chosen.quant_method == "none":
        return None
    size = chosen.weight_block_size
    block = size if size is None else [size, size] if isinstance(size, int) else list(size)
    return chosen.model_dump() | {"weight_block_size": block}
