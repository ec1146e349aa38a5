"""Models and their training operations."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from fastapi import APIRouter, Request

from ...engine import messages
from .. import provenance
from ..errors import ApiError, BadRequest, StorageQuotaExceeded
from ..operation import Operation, Submission, natural_key
from ..runs import model_id, new_seed
from ..wire import forward_backward as wire
from ..wire import requests
from . import Backend, BackendOf, Owner, future

router = APIRouter(prefix="/api/v1", tags=["training"])

_DECODED_ASIDE_BYTES = 128 << 10  # larger bodies are decoded in a thread, so that polls need not wait


def optimizer_of(config: requests.OptimizerConfig | None) -> dict[str, Any]:
    """Raises BadRequest for a family that this server does not have."""
    chosen = config or requests.OptimizerConfig()
    fields = chosen.model_extra or {}
    if chosen.type == "adamw":
        return {"type": "adamw"}
    if chosen.type != "dimuon":
        raise BadRequest(
            f"optimizer_config: unknown type {chosen.type[:64]!r}; this server has adamw and dimuon"
        )
    if set(fields) - {"version"} or fields.get("version", 1) != 1:
        raise BadRequest("optimizer_config: of dimuon this server has version 1, which has no other fields")
    return {"type": "dimuon", "version": 1}


def lora_of(backend: Backend, config: requests.LoraConfig | None) -> messages.LoraSpec | None:
    """The adapter asked for; None trains the full weights. Raises BadRequest for what cannot be had."""
    settings = backend.settings
    if config is None or config.rank == 0:
        if not settings.full_weight:
            raise BadRequest(
                f"lora_config: this server trains adapters only; ask for a rank of 1 to {settings.max_rank} "
                "(or start it with --full-weight)"
            )
        return None
    if config.rank > settings.max_rank:
        raise BadRequest(
            f"lora_config.rank: {config.rank} is over this server's maximum of {settings.max_rank}"
        )
    if not (config.train_attn or config.train_mlp or config.train_unembed):
        raise BadRequest("lora_config: nothing to train; set train_attn, train_mlp or train_unembed")
    return messages.LoraSpec(
        rank=config.rank,
        alpha=settings.lora_alpha,
        seed=new_seed() if config.seed is None else config.seed % (1 << 31),
        train_attn=config.train_attn,
        train_mlp=config.train_mlp,
        train_unembed=config.train_unembed,
    )


@router.post("/create_model")
async def create_model(body: requests.CreateModel, backend: BackendOf, owner: Owner) -> dict[str, str]:
    await backend.sessions.require_active(owner, body.session_id)
    backend.base_model(body.base_model)
    identifier = model_id(body.session_id, body.model_seq_id)
    optimizer = optimizer_of(body.optimizer_config)
    message = messages.CreateModel(
        request_id="",
        model_id=identifier,
        base_model=body.base_model,
        lora=lora_of(backend, body.lora_config),
        optimizer=optimizer["type"],
    )
    with backend.admission.model(owner, identifier, backend.runs.alive(owner)):
        operation = await backend.runs.create(
            owner,
            body.session_id,
            body.model_seq_id,
            message,
            optimizer,
            body.user_metadata or {},
            {"type": "create_model", "model_id": identifier},
        )
    return future(operation)


@router.post("/get_info")
async def get_info(body: requests.GetInfo, backend: BackendOf, owner: Owner) -> dict[str, Any]:
    run = await backend.runs.find(owner, body.model_id)
    model = backend.base_models.get(run.base_model)
    model_data: dict[str, Any] = {"arch": "transformer", "model_name": run.base_model}
    if model is not None and model.hub_id is not None:
        model_data["tokenizer_id"] = model.hub_id
    elif model is not None and backend.settings.is_loopback:
        # The client is on this machine and can read the tokenizer from the folder.
        model_data["tokenizer_id"] = str(model.folder)
    info = {
        "type": "get_info",
        "model_id": run.id,
        "model_name": run.base_model,
        "model_data": model_data,
        "is_lora": run.lora is not None,
        "optimizer_config": run.optimizer,
    }
    if run.lora is not None:
        info["lora_rank"] = run.lora["rank"]
        info["lora_alpha"] = run.lora["alpha"]
    return info


async def submit(
    backend: Backend,
    owner: str,
    kind: str,
    identifier: str,
    seq_id: int | None,
    message: messages.ToEngine,
    reply: dict[str, Any] | None = None,
    also: Any = None,
) -> Operation:
    """A sequenced operation of a model. `message` has no request id yet."""
    run = await backend.runs.find_trainable(owner, identifier)
    key = None if seq_id is None else natural_key(run.id, seq_id)
    number = backend.runs.unused_seq(run) if seq_id is None else seq_id
    if not backend.runs.is_alive(run):
        backend.admission.come_back(owner, backend.runs.alive(owner))
    with backend.admission.operation(owner, backend.runs.is_early(run, number)) as accepted:
        operation = await backend.operations.accept(
            Submission(
                owner,
                kind,
                key,
                lambda request_id: msgspec.structs.replace(message, request_id=request_id),
                reply or {},
                run.id,
                number,
                also,
            )
        )
        accepted(operation)
    return operation


async def refuse(backend: Backend, owner: str, model: Any, seq_id: Any, error: ApiError) -> None:
    """A submit is wrong for good: its number is used up. One without room may be sent again."""
    if error.final:
        await backend.operations.consume(owner, model, seq_id, error.message)
    elif isinstance(error, StorageQuotaExceeded) and isinstance(seq_id, int):
        backend.refused_saves.refused(owner, model, seq_id, error.message)


@router.post("/forward_backward")
async def forward_backward(request: Request, backend: BackendOf, owner: Owner) -> dict[str, str]:
    """A protobuf ForwardBackwardRequest, also compressed with zstd."""
    return await _forward_backward(request, backend, owner, forward_only=False)


@router.post("/forward")
async def forward(request: Request, backend: BackendOf, owner: Owner) -> dict[str, str]:
    """As forward_backward with forward_only."""
    return await _forward_backward(request, backend, owner, forward_only=True)


async def _forward_backward(
    request: Request, backend: Backend, owner: str, forward_only: bool
) -> dict[str, str]:
    raw = await request.body()
    settings = backend.settings
    content_type = request.headers.get("content-type", "").partition(";")[0].strip()
    if content_type != "application/x-protobuf":
        raise BadRequest(
            f"Content-Type {content_type!r}: send a ForwardBackwardRequest as application/x-protobuf"
        )
    encoding = request.headers.get("content-encoding", "")
    model, seq_id = None, None
    try:
        content = wire.decompress(raw, encoding, settings.max_body_bytes)
        model, seq_id = wire.peek(content)
        if len(content) > _DECODED_ASIDE_BYTES:
            body = await asyncio.to_thread(wire.decode, content, settings.max_datums)
        else:
            body = wire.decode(content, settings.max_datums)
        _check_seq_id(body.seq_id)
        model, seq_id = body.model_id, body.seq_id
        only = forward_only or body.forward_only
        data = body.data
        if body.loss_fn in provenance.LOSSES:
            data = await provenance.with_sampled_logprobs(backend.operations, owner, data, body.spans)
        custom_loss = None
        if body.loss_id is not None:
            run = await backend.runs.find(owner, body.model_id)
            custom_loss = await backend.custom_losses.find(owner, run.session_id, body.loss_id)
        message = messages.ForwardBackward(
            request_id="",
            model_id=body.model_id,
            data=data,
            loss_fn=body.loss_fn,
            loss_config=body.loss_config,
            forward_only=only,
            custom_loss=custom_loss,
        )
        operation = await submit(
            backend, owner, "forward" if only else "forward_backward", body.model_id, body.seq_id, message
        )
    except ApiError as error:
        await refuse(backend, owner, model, seq_id, error)
        raise
    return future(operation)


def _check_seq_id(seq_id: int) -> None:
    if seq_id < 1:
        raise BadRequest(f"seq_id: {seq_id}; the first operation of a model has seq_id 1")


@router.post("/optim_step")
async def optim_step(body: requests.OptimStep, backend: BackendOf, owner: Owner) -> dict[str, str]:
    try:
        run = await backend.runs.find_trainable(owner, body.model_id)
        if body.family != run.optimizer["type"]:
            raise BadRequest(
                f"optimizer_params: they are for {body.family!r}; "
                f"this model's optimizer is {run.optimizer['type']}"
            )
        operation = await submit(backend, owner, "optim_step", body.model_id, body.seq_id, body.message())
    except ApiError as error:
        await refuse(backend, owner, body.model_id, body.seq_id, error)
        raise
    return future(operation)
