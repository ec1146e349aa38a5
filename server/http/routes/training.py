"""Training operations of models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from ....engine import messages
from ...dialect import DIALECT_RULES
from ...errors import ApiError, BadRequest
from ...models.admission import Admission
from ...models.losses import SAMPLED_LOSSES, CustomLosses, with_sampled_logprobs
from ...models.run import Run
from ...models.runs import Runs
from ...models.sessions import Sessions
from ...models.submits import Submits
from ...offload import INLINE_BYTES, Offload
from ...operations.operations import Operations
from ...plugins.rlve.runs import RlveRuns
from ...settings import Settings
from ...wire import forward_backward as wire
from ...wire import responses
from ...wire import training as json_wire
from ...wire.body import OfModel, Sequenced
from ...wire.requests import CreateCustomLoss
from ...wire.training import PER_TOKEN, ReadBody, with_datums
from ...wire.training import read as read_body
from ..bodies import BodyRoute, body_is_read, received
from ..dependencies import Owner, described_as, future
from ..provided import Provided

router = APIRouter(prefix="/api/v1", tags=["training"], route_class=BodyRoute)


@router.post("/forward_backward", responses=described_as(responses.Future))
async def forward_backward(
    request: Request,
    settings: Provided[Settings],
    operations: Provided[Operations],
    custom_losses: Provided[CustomLosses],
    runs: Provided[Runs],
    offload: Provided[Offload],
    submits: Provided[Submits],
    owner: Owner,
) -> dict[str, Any]:
    """JSON; or a protobuf ForwardBackwardRequest, also compressed with zstd."""
    return await _forward_backward(
        request, settings, operations, custom_losses, runs, offload, submits, owner, forward_only=False
    )


@router.post("/forward", responses=described_as(responses.Future))
async def forward(
    request: Request,
    settings: Provided[Settings],
    operations: Provided[Operations],
    custom_losses: Provided[CustomLosses],
    runs: Provided[Runs],
    offload: Provided[Offload],
    submits: Provided[Submits],
    owner: Owner,
) -> dict[str, Any]:
    """As forward_backward, without gradients."""
    return await _forward_backward(
        request, settings, operations, custom_losses, runs, offload, submits, owner, forward_only=True
    )


async def _forward_backward(
    request: Request,
    settings: Settings,
    operations: Operations,
    custom_losses: CustomLosses,
    runs: Runs,
    offload: Offload,
    submits: Submits,
    owner: str,
    forward_only: bool,
) -> dict[str, Any]:
    read = await _read(request, settings, offload, owner)
    model, seq_id = read.model_id, read.seq_id
    try:
        if read.error is not None:
            raise read.error
        if seq_id is not None:
            _check_seq_id(seq_id)
        body = await with_datums(read)
        run = await runs.find_trainable(owner, body.model_id)
        _check_limits(body, run)
        only = forward_only or body.forward_only
        message = await _message(body, run, only, operations, custom_losses)
        kind = "forward" if only else "forward_backward"
        operation = await submits.submit(run, kind, seq_id, message)
    except ApiError as error:
        await submits.refuse(owner, model, seq_id, error)
        raise
    return future(operation)


async def _read(request: Request, settings: Settings, offload: Offload, owner: str) -> ReadBody:
    """Small bodies are read here, large ones in a worker; what is compressed may be large."""
    pieces = await received(request)
    encoding = request.headers.get("content-encoding", "")
    as_sent = (request.headers.get("content-type", ""), encoding)
    within = (settings.max_body_bytes, settings.max_datums)
    if sum(map(len, pieces)) <= INLINE_BYTES and encoding in ("", "identity"):
        read = read_body(b"".join(pieces), *as_sent, *within)
    else:
        read = await offload.in_process(owner, read_body, pieces, *as_sent, *within)
    pieces.clear()
    await body_is_read(request)
    return read


async def _message(
    body: wire.ForwardBackwardBody,
    run: Run,
    forward_only: bool,
    operations: Operations,
    custom_losses: CustomLosses,
) -> messages.ForwardBackward:
    data = body.data
    if body.loss_fn in SAMPLED_LOSSES:
        data = await with_sampled_logprobs(operations, run.owner, data, body.spans)
    custom_loss = None
    if body.loss_id is not None:
        custom_loss = await custom_losses.find(run.owner, run.session_id, body.loss_id)
    per_token = body.loss_config.get(PER_TOKEN, DIALECT_RULES[run.dialect].elementwise_loss)
    if per_token not in (False, True):  # 0 and 1 too
        raise BadRequest(f"loss_fn_config[{PER_TOKEN!r}] is {per_token!r}; it must be true or false")
    return messages.ForwardBackward(
        request_id="",
        model_id=run.id,
        data=data,
        loss_fn=body.loss_fn,
        loss_config={key: value for key, value in body.loss_config.items() if key != PER_TOKEN},
        forward_only=forward_only,
        custom_loss=custom_loss,
        elementwise_loss=bool(per_token) and custom_loss is None,
        owner="" if custom_loss is None else run.owner,
    )


def _check_seq_id(seq_id: int) -> None:
    if seq_id < 1:
        raise BadRequest(f"seq_id: {seq_id}; the first operation of a model has seq_id 1")


def _check_limits(body: wire.ForwardBackwardBody, run: Run) -> None:
    """Those that the model was created with, and the shapes."""
    if run.create_message.target_alignment == "shifted":
        wire.check_rows(body)
    datums, tokens = (run.configuration.get(name) for name in ("max_batch_size", "max_seq_len"))
    if datums is not None and len(body.data) > datums:
        raise BadRequest(f"data: {len(body.data)} datums are over this model's max_batch_size of {datums}")
    for index, datum in enumerate(body.data):
        if tokens is not None and len(datum.tokens) // 4 > tokens:
            raise BadRequest(
                f"datum {index}: {len(datum.tokens) // 4} tokens are over the model's max_seq_len of {tokens}"
            )


@router.post("/optim_step", responses=described_as(responses.Future))
async def optim_step(
    body: json_wire.OptimStep, runs: Provided[Runs], submits: Provided[Submits], owner: Owner
) -> dict[str, Any]:
    try:
        run = await runs.find_trainable(owner, body.model_id)
        family = run.optimizer["type"]
        if body.family not in ("", family):
            raise BadRequest(
                f"optimizer_params: they are for {body.family!r}; this model's optimizer is {family}"
            )
        if family == "dimuon" and body.family == "":
            raise BadRequest("optimizer_params: missing; this model's optimizer is dimuon")
        message = body.message(run.id, run.configuration.get("steps"))
        reply = {"learning_rates": [_learning_rate(message)], "success": True, "info": {}}
        if body.step_num is not None:
            reply["step_num"] = body.step_num
        operation = await submits.submit(run, "optim_step", body.seq_id, message, reply)
    except ApiError as error:
        await submits.refuse(owner, body.model_id, body.seq_id, error)
        raise
    return future(operation)


def _learning_rate(message: messages.OptimStep) -> float:
    return message.params.learning_rate if message.dimuon is None else message.dimuon.learning_rate


@router.post("/abort_gradient_epoch", responses=described_as(responses.Future))
async def abort_gradient_epoch(
    body: Sequenced, runs: Provided[Runs], submits: Provided[Submits], owner: Owner
) -> dict[str, Any]:
    """Forgets the gradients that were accumulated since the last step."""
    try:
        run = await runs.find_trainable(owner, body.model_id)
        message = messages.DropGradients("", run.id)
        reply = {"type": "abort_gradient_epoch", "success": True, "info": {}}
        operation = await submits.submit(run, "drop_gradients", body.seq_id, message, reply)
    except ApiError as error:
        await submits.refuse(owner, body.model_id, body.seq_id, error)
        raise
    return future(operation)


@router.post("/create_custom_loss", responses=described_as(responses.Future))
async def create_custom_loss(
    body: CreateCustomLoss,
    admission: Provided[Admission],
    custom_losses: Provided[CustomLosses],
    sessions: Provided[Sessions],
    owner: Owner,
) -> dict[str, str]:
    session_id = await sessions.require_active(owner, body.session_id)
    loss, seq_id = body.message(), body.custom_loss_seq_id
    with admission.operation(owner, early=False) as accepted:
        operation = await custom_losses.create(owner, session_id, seq_id, loss)
        accepted(operation)
    return future(operation)


@router.post("/stop_rlve", responses=described_as(responses.RlveModel))
async def stop_rlve(
    body: OfModel, runs: Provided[Runs], rlve: Provided[RlveRuns], owner: Owner
) -> dict[str, Any]:
    """A step that has begun to train is ended first; the client then has the model to itself."""
    run = await runs.find_trainable(owner, body.model_id)
    await rlve.stop(run)
    return {"model_id": run.name, "rlve": await rlve.described(run)}


@router.post("/resume_rlve", responses=described_as(responses.RlveModel))
async def resume_rlve(
    body: OfModel, runs: Provided[Runs], rlve: Provided[RlveRuns], owner: Owner
) -> dict[str, Any]:
    """Goes on after the last step that was counted, without gradients that were accumulated since."""
    run = await runs.find_trainable(owner, body.model_id)
    await rlve.resume(run)
    return {"model_id": run.name, "rlve": await rlve.described(run)}
