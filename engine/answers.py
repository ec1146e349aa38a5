"""Answers to requests, and their lines in the log."""

from __future__ import annotations

import logging
import uuid

import numpy as np

from . import log_lines, logs, messages
from .errors import MissingWeights, UserError, reason
from .training.device_batch import JobOutput

log = logging.getLogger(__name__)


def answer_to(
    request: messages.ToEngine, outcome: messages.Output | BaseException, seconds: float
) -> messages.Done | messages.Failed:
    """Return Done, or Failed with the user's mistake or the id of an error that the log explains."""
    match outcome:
        case MissingWeights():
            return messages.Failed(request.request_id, str(outcome), "missing")
        case UserError():
            return messages.Failed(request.request_id, str(outcome), "user", seconds)
        case BaseException():
            error_id = uuid.uuid4().hex[:8]
            log.error("error %s in %s", error_id, log_lines.described(request), exc_info=outcome)
            message = f"{reason(outcome)} (error {error_id} in the server's log)"
            return messages.Failed(
                request.request_id, message, "server"
            )  # our own faults cost the user nothing
    return messages.Done(request.request_id, outcome, seconds)


def note(request: messages.ToEngine, answer: messages.Done | messages.Failed) -> None:
    """Log the answer."""
    what = log_lines.described(request)
    with logs.ids(operation_id=request.request_id, model_id=getattr(request, "model_id", None)):
        if isinstance(answer, messages.Failed):
            log.warning("%s: failed (%s): %s", what, answer.category, answer.message)
        else:
            log.info("%s: %s in %.3f s", what, log_lines.result(answer.output), answer.device_seconds)


def forward_backward_output(result: JobOutput) -> messages.ForwardBackwardOutput:
    """Return log-probs and losses as float32 bytes, in the client's order."""
    losses = None if result.losses is None else _tensors(result.losses)
    return messages.ForwardBackwardOutput(_tensors(result.logprobs), result.metrics, losses)


def _tensors(arrays: list[np.ndarray]) -> list[messages.Tensor]:
    return [
        messages.Tensor("float32", array.shape, np.ascontiguousarray(array, "<f4").tobytes())
        for array in arrays
    ]
