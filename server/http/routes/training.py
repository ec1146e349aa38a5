"""Training operations of models."""

from __future__ import annotations

import sys
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from ....engine import messages
from ...dialect import DIALECT_RULES
from ...errors import ApiError, BadRequest
from ...models.losses import SAMPLED_LOSSES, CustomLosses, with_sampled_logprobs
from ...models.run import Run
from ...models.runs import Runs
from ...models.sessions import Sessions
from ...models.submits import Admission, Submits
from ...offload import INLINE_BYTES, Offload
from ...operations.operations import Operations
from ...plugins.rlve.runs import RlveRuns
from ...settings import Settings
from ...wire import OfModel, Sequenced, responses
from ...wire import forward_backward as wire
from ...wire import training as json_wire
from ...wire.requests import CreateCustomLoss
from ...wire.training import PER_TOKEN, ReadBody, with_datums
from ...wire.training import read as read_body
from ..bodies import BodyRoute, body_is_read
from ..dependencies import Owner, Provided, described_as, future
from .futures import json_response

router = APIRouter(prefix="/api/v1", tags=["training"], route_class=BodyRoute)


class Passes:
    """Submits forward and backward passes: reads a body, finds its model, and makes the engine's message."""

    def __init__(
        self,
        settings: Settings,
        offload: Offload,
        operations: Operations,
        custom_losses: CustomLosses,
        runs: Runs,
        submits: Submits,
    ):
        self._settings = settings
        self._offload = offload
        self._operations = operations
        self._custom_losses = custom_losses
        self._runs = runs
        self._submits = submits

    async def submit(self, request: Request, owner: str, forward_only: bool) -> Response:
        headers = request.headers
        kind, encoding = headers.get("content-type", ""), headers.get("content-encoding", "")
        is_plain = kind == json_wire.PROTOBUF and encoding in ("", "identity")
        if is_plain and int(headers.get("content-length", sys.maxsize)) <= INLINE_BYTES:
            raw = await request.body()
            try:
                decoded = wire.decode(raw, self._settings.max_datums)
                read = ReadBody(decoded.model_id, decoded.seq_id, None, decoded)
            except ApiError as error:
                read = ReadBody(*wire.peek(raw), error)
        else:
            read = await self._read(request, owner, kind, encoding)
        model, seq_id = read.model_id, read.seq_id
        try:
            if read.body is None:
                raise read.error or BadRequest("the body cannot be read")
            if seq_id is not None and seq_id < 1:
                raise BadRequest(f"seq_id: {seq_id}; the first operation of a model has seq_id 1")
            body = await with_datums(read) if read.pieces else read.body
            run = await self._runs.find_trainable(owner, body.model_id)
            message = await self._message(body, run, forward_only or body.forward_only)
            name = "forward" if message.forward_only else "forward_backward"
            operation = await self._submits.submit(run, name, seq_id, message)
        except ApiError as error:
            await self._submits.refuse(owner, model, seq_id, error)
            raise
        accepted = orjson.dumps({"request_id": operation.request_id, "model_id": run.name})
        return Response(accepted, media_type="application/json")

    async def _read(self, request: Request, owner: str, kind: str, encoding: str) -> ReadBody:
        """Read a small body here and a large one in a worker; what is compressed may be large."""
        pieces = [piece async for piece in request.stream()]
        as_sent = (kind, encoding, self._settings.max_body_bytes, self._settings.max_datums)
        if sum(map(len, pieces)) <= INLINE_BYTES and encoding in ("", "identity"):
            read = read_body(b"".join(pieces), *as_sent)
        else:
            read = await self._offload.in_process(owner, read_body, pieces, *as_sent)
        pieces.clear()
        await body_is_read(request)
        return read

    async def _message(
        self, body: wire.ForwardBackwardBody, run: Run, forward_only: bool
    ) -> messages.ForwardBackward:
        """Make the engine's message of a body. Raises BadRequest for one that the model does not take."""
        data = body.data
        if run.create_message.target_alignment == "shifted" and any(
            tensor.shape[0] != len(datum.tokens) // 4 for datum in data for tensor in datum.inputs.values()
        ):
            wire.check_rows(body)
        if run.configuration:
            _check_limits(body, run)
        if body.loss_fn in SAMPLED_LOSSES:
            data = await with_sampled_logprobs(self._operations, run.owner, data, body.spans)
        custom_loss = None
        if body.loss_id is not None:
            custom_loss = await self._custom_losses.find(run.owner, run.session_id, body.loss_id)
        per_token = body.loss_config.pop(PER_TOKEN, DIALECT_RULES[run.dialect].elementwise_loss)
        if per_token not in (False, True):  # 0 and 1 too
            raise BadRequest(f"loss_fn_config[{PER_TOKEN!r}] is {per_token!r}; it must be true or false")
        return messages.ForwardBackward(
            request_id="",
            model_id=run.id,
            data=data,
            loss_fn=body.loss_fn,
            loss_config=body.loss_config,
            forward_only=forward_only,
            custom_loss=custom_loss,
            elementwise_loss=bool(per_token) and custom_loss is None,
            owner="" if custom_loss is None else run.owner,
        )


@router.post("/forward_backward", response_model=dict[str, Any], responses=described_as(responses.Future))
async def forward_backward(request: Request, passes: Provided[Passes], owner: Owner) -> Response:
    """Add a batch's gradients. The body is JSON, or a protobuf ForwardBackwardRequest, perhaps with zstd."""
    return await passes.submit(request, owner, forward_only=False)


@router.post("/forward", response_model=dict[str, Any], responses=described_as(responses.Future))
async def forward(request: Request, passes: Provided[Passes], owner: Owner) -> Response:
    """Compute as forward_backward does, without gradients."""
    return await passes.submit(request, owner, forward_only=True)


def _check_limits(body: wire.ForwardBackwardBody, run: Run) -> None:
    """Raise BadRequest for what is over the limits that the model was created with."""
    datums, tokens = run.configuration.get("max_batch_size"), run.configuration.get("max_seq_len")
    if datums is not None and len(body.data) > datums:
        raise BadRequest(f"data: {len(body.data)} datums are over this model's max_batch_size of {datums}")
    for index, datum in enumerate(body.data):
        if tokens is not None and len(datum.tokens) // 4 > tokens:
            raise BadRequest(
                f"datum {index}: {len(datum.tokens) // 4} tokens are over the model's max_seq_len of {tokens}"
            )


@router.post("/optim_step", response_model=dict[str, Any], responses=described_as(responses.Future))
async def optim_step(
    body: json_wire.OptimStep, runs: Provided[Runs], submits: Provided[Submits], owner: Owner
) -> Response:
    """Step the model's optimizer with the gradients accumulated since its last step."""
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
    return json_response(future(operation))


def _learning_rate(message: messages.OptimStep) -> float:
    return message.params.learning_rate if message.dimuon is None else message.dimuon.learning_rate


@router.post("/abort_gradient_epoch", responses=described_as(responses.Future))
async def abort_gradient_epoch(
    body: Sequenced, runs: Provided[Runs], submits: Provided[Submits], owner: Owner
) -> dict[str, Any]:
    """Drop the gradients that were accumulated since the last step."""
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
    """Upload a traced loss function, for later `forward_backward`s of the session."""
    session_id = await sessions.require_active(owner, body.session_id)
    loss, seq_id = body.message(), body.custom_loss_seq_id
    admission.operations.enter(owner)
    operation = None
    try:
        operation = await custom_losses.create(owner, session_id, seq_id, loss)
    finally:
        admission.operations.leave(owner, operation)
    return future(operation)


@router.post("/stop_rlve", responses=described_as(responses.RlveModel))
async def stop_rlve(
    body: OfModel, runs: Provided[Runs], rlve: Provided[RlveRuns], owner: Owner
) -> dict[str, Any]:
    """Stop the server's training of a model, after the step that has begun. The client may then train it."""
    run = await runs.find_trainable(owner, body.model_id)
    await rlve.stop(run)
    return {"model_id": run.name, "rlve": await rlve.described(run)}


@router.post("/resume_rlve", responses=described_as(responses.RlveModel))
async def resume_rlve(
    body: OfModel, runs: Provided[Runs], rlve: Provided[RlveRuns], owner: Owner
) -> dict[str, Any]:
    """Resume the training after the last recorded step, without gradients that were accumulated since."""
    run = await runs.find_trainable(owner, body.model_id)
    await rlve.resume(run)
    return {"model_id": run.name, "rlve": await rlve.described(run)}
