"""A device batch of jobs whose losses clients uploaded, in three stages.

The log-probs of all datums come from the forward programs; the losses are differentiated by them; and the
model's gradients are then, by the chain rule, those of cross-entropy with the weights -dLoss/dlogprob. The
SDK does the same where a server takes no losses, and it adds no program to the device.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np

from .. import messages
from ..errors import UserError
from . import validation
from .custom_loss_processes import Account, CustomLossProcesses
from .custom_losses import CustomLosses, Differentiated
from .device_batch import DeviceBatch, Job, JobOutput, NonFiniteError
from .training_state import TrainingState

_TURN_SECONDS = 0.1  # seconds of losses per turn


@dataclass(frozen=True)
class CustomJob:
    """A checked operation of `owner` with a custom loss. `inputs` has, for each datum, what the loss reads
    besides the log-probs. `linear` is the operation with cross-entropy, its weights zero."""

    linear: Job
    loss: messages.CustomLoss
    inputs: list[dict[str, np.ndarray]]
    owner: str

    @property
    def state(self) -> TrainingState:
        return self.linear.state


def custom_job(
    state: TrainingState,
    operation: messages.ForwardBackward,
    losses: CustomLosses,
    vocab_size: int,
    max_length: int,
    routing: tuple[int, int, int] | None,
) -> CustomJob:
    """Check an operation with a custom loss. Raises UserError naming the datum and the field."""
    loss = operation.custom_loss
    if loss is None or operation.loss_config:
        raise UserError("loss 'custom' takes a loss_id of create_custom_loss, and no other config")
    losses.graph(loss)
    surrogate = validation.check_loss("cross_entropy", {})
    data = [_linear(datum) for datum in operation.data]
    checked = validation.check_data(data, surrogate, vocab_size, max_length, routing)
    rank = loss.inputs[0][1]
    inputs = []
    for index, (datum, linear) in enumerate(zip(operation.data, checked, strict=True)):
        if len(linear.shape) != rank:
            raise UserError(
                f"datum {index}: loss_fn_inputs['target_tokens'] has rank {len(linear.shape)}; loss "
                f"{loss.name!r} takes logprobs of rank {rank}"
            )
        inputs.append({name: _input(index, datum, name, rank) for name, rank in loss.inputs[1:]})
    return CustomJob(Job(state, checked, surrogate, operation.forward_only), loss, inputs, operation.owner)


def _linear(datum: messages.Datum) -> messages.Datum:
    targets = datum.inputs.get("target_tokens")
    if targets is None:
        return messages.Datum(datum.tokens, {})  # named by the check
    count = min(math.prod(targets.shape), len(targets.data))  # not beyond the end: the check comes later
    zeros = messages.Tensor("float32", targets.shape, bytes(4 * count))
    experts = {name: each for name, each in datum.inputs.items() if name == validation.EXPERTS}
    return messages.Datum(datum.tokens, {"target_tokens": targets, "weights": zeros} | experts)


def _input(index: int, datum: messages.Datum, name: str, rank: int) -> np.ndarray:
    where = f"datum {index}: loss_fn_inputs[{name!r}]"
    tensor = datum.inputs.get(name)
    if tensor is None:
        raise UserError(f"{where} is missing; the custom loss reads it")
    values = validation.decode(where, tensor)
    if rank == 0 and values.size == 1:
        return values.reshape(())
    if values.ndim != rank:
        raise UserError(f"{where} has shape {list(values.shape)}; the custom loss declared rank {rank}")
    return values


class CustomLossBatch:
    """A batch like `DeviceBatch`: after `step` returns True, `results` holds one output or error per job."""

    def __init__(
        self,
        jobs: Sequence[CustomJob],
        start_batch: Callable[[Sequence[Job]], DeviceBatch],
        processes: CustomLossProcesses,
    ):
        """`start_batch` starts the batches for the log-probs and the gradients; `processes` differentiate the
        losses."""
        self._jobs = list(jobs)
        self._start_batch = start_batch
        self._processes = processes
        self.results: list[JobOutput | Exception] = []
        self._accounts: list[Account] = []
        self.tokens = self.positions = 0  # as those of `DeviceBatch`
        self._stages = self._run()

    @property
    def seconds_beside(self) -> float:
        """Seconds that the losses have taken in their own processes, besides the turns of this batch."""
        return sum(account.seconds for account in self._accounts)

    def step(self) -> bool:
        """Run a micro-batch, or compute some datums' losses; return whether the batch has ended."""
        return next(self._stages, True)

    def close(self) -> None:
        """Stop a batch that will not be stepped again."""
        self._stages.close()

    def _run(self) -> Generator[bool, None, None]:
        forward = self._start_batch(
            [dataclasses.replace(job.linear, forward_only=True) for job in self._jobs]
        )
        while not forward.step():
            yield False
        self._count(forward)
        outcomes: list[list[Differentiated] | Exception] = []
        for job, output in zip(self._jobs, forward.results, strict=True):
            outcome: list[Differentiated] | Exception
            try:
                outcome = yield from self._differentiate(job, output)
            except Exception as error:
                outcome = error
            outcomes.append(outcome)
        backward = {
            at: _with_weights(job.linear, outcome)
            for at, (job, outcome) in enumerate(zip(self._jobs, outcomes, strict=True))
            if not isinstance(outcome, Exception) and not job.linear.forward_only
        }
        results = dict(enumerate(forward.results))
        if backward:
            batch = self._start_batch(list(backward.values()))
            while not batch.step():
                yield False
            self._count(batch)
            results |= dict(zip(backward, batch.results, strict=True))
        for job, outcome in zip(self._jobs, outcomes, strict=True):
            failed = isinstance(outcome, Exception) and not job.linear.forward_only
            job.state.failed_since_step += failed  # the batch has counted the failures of the others
        self.results = [_output(results[at], outcome) for at, outcome in enumerate(outcomes)]
        yield True

    def _count(self, batch: DeviceBatch) -> None:
        self.tokens, self.positions = self.tokens + batch.tokens, self.positions + batch.positions

    def _differentiate(
        self, job: CustomJob, output: JobOutput | Exception
    ) -> Generator[bool, None, list[Differentiated]]:
        """Differentiate the losses, yielding between turns; return the results by datum. Raises UserError
        naming one."""
        if isinstance(output, Exception):
            raise output
        differentiated = []
        account = Account(job.owner)
        self._accounts.append(account)
        began = time.perf_counter()
        for index, (logprobs, inputs) in enumerate(zip(output.logprobs, job.inputs, strict=True)):
            try:
                of_datum = yield from self._processes.differentiate(account, job.loss, logprobs, inputs)
            except UserError as error:
                raise UserError(f"datum {index}: custom loss {job.loss.name!r}: {error}") from None
            _check_finite(index, job.loss.name, of_datum)
            differentiated.append(of_datum)
            if time.perf_counter() - began > _TURN_SECONDS:
                yield False
                began = time.perf_counter()
        return differentiated


def _check_finite(index: int, name: str, of_datum: Differentiated) -> None:
    if not math.isfinite(of_datum.loss):
        what = f"is {of_datum.loss}"
    elif not np.isfinite(of_datum.gradient).all():
        at = np.argwhere(~np.isfinite(of_datum.gradient))[0].tolist()
        what = f"has the gradient {of_datum.gradient[tuple(at)]} by the log-prob at {at}"
    else:
        return
    raise NonFiniteError(f"datum {index}: custom loss {name!r} {what}; nothing was accumulated")


def _with_weights(linear: Job, differentiated: list[Differentiated]) -> Job:
    data = [
        dataclasses.replace(datum, inputs={"weights": -of_datum.gradient.reshape(datum.targets.shape)})
        for datum, of_datum in zip(linear.data, differentiated, strict=True)
    ]
    return dataclasses.replace(linear, data=data)


def _output(
    output: JobOutput | Exception, outcome: list[Differentiated] | Exception
) -> JobOutput | Exception:
    """Return the client's log-probs, with the metrics of its own loss instead of the linear one's."""
    if isinstance(outcome, Exception) or isinstance(output, Exception):
        return outcome if isinstance(outcome, Exception) else output
    valid = sum(int((each.gradient.reshape(len(each.gradient), -1) != 0).any(-1).sum()) for each in outcome)
    metrics = {
        **output.metrics,
        "valid_tokens:sum": float(valid),
        "loss:sum": math.fsum(each.loss for each in outcome),
    }
    for key in outcome[0].metrics:
        total = math.fsum(each.metrics[key] for each in outcome)
        metrics[key] = total / len(outcome) if key.endswith(":mean") else total
    return JobOutput(output.logprobs, metrics)
