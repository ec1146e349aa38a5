"""One device batch of training jobs: packed, computed by micro-batches, answered in the clients' order."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...losses import MAX_CONFIG, Loss
from ..errors import UserError
from .alignment import Aligned
from .gradient_accumulation import GradientAccumulation
from .gradient_programs import DoesNotFitError, GradientPrograms
from .packing import ROW_MULTIPLE_OF, MicroBatch, ShapeTable, pack
from .policy_metrics import policy_metrics
from .router_metrics import router_metrics
from .train_step import BATCH_INPUTS, LOSS_INDEX, SEQUENCE_INPUTS, Batch, Outputs
from .training_state import TrainingState
from .training_structure import structure
from .validation import ChosenLoss, TrainingDatum

log = logging.getLogger(__name__)

MODELS_PER_BATCH = (1, 2, 4, 8)
IN_FLIGHT = 2  # micro-batches dispatched and not yet read back


class NonFiniteError(UserError):
    """The loss or its gradient is NaN or infinite; nothing was accumulated."""


@dataclass(frozen=True)
class Job:
    """A checked forward or forward_backward of one model. `elementwise`: also return each token's loss."""

    state: TrainingState
    data: list[TrainingDatum]
    chosen: ChosenLoss
    forward_only: bool = False
    aligned: list[Aligned] | None = None  # the client's layout of the datums; None: that of `data`
    elementwise: bool = False

    @property
    def loss(self) -> Loss:
        return self.chosen.loss

    @property
    def tokens(self) -> int:
        return sum(len(datum.tokens) for datum in self.data)

    @property
    def valid_tokens(self) -> int:
        """Tokens that the loss weighs."""
        return sum(int((datum.inputs[self.loss.valid] != 0).any(-1).sum()) for datum in self.data)


@dataclass(frozen=True)
class JobOutput:
    """The result of a job.

    Per datum, in the client's order: float32 log-probs and, if requested, losses, shaped like its
    target_tokens; and the metrics.
    """

    logprobs: list[np.ndarray]
    metrics: dict[str, float]
    losses: list[np.ndarray] | None = None


@dataclass(frozen=True)
class _Kind:
    """The traits that datums must have in common to share a micro-batch."""

    structure: Any  # the adapters' structure; full weights are never shared
    forward_only: bool
    sequence_level: bool
    targets: int  # per token, bucketed
    experts: tuple[int, ...] | None  # layers with experts and experts per token, of datums that name them


_Planned = tuple[_Kind, list[tuple[int, int]], MicroBatch]


class DeviceBatch:
    """One device batch (`Trainer.start`). After `step` returns True, `results` has one output or error per
    job.

    A job is all or nothing: its gradient was added and its result is an output, or nothing was added and its
    result is an error. If `step` raises, nothing was added for any job.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        shapes: ShapeTable,
        programs: GradientPrograms,
        accumulation: GradientAccumulation,
    ):
        self._jobs = list(jobs)
        self._shapes = shapes
        self._programs = programs
        self._accumulation = accumulation
        self._out_of_memory = False
        self.seconds_beside = 0.0  # all of its work is in its turns
        self.tokens = self.positions = 0
        """Computed tokens and positions with padding, over all attempts."""
        self.results: list[JobOutput | Exception] = []
        self._begin()

    def _begin(self) -> None:
        self._gradients: dict[int, Any] = {}
        self._losses = np.zeros(len(self._jobs))
        self._expert_tokens: list[Any] = [0] * len(self._jobs)  # [M, E] each, of mixtures that are trained
        self._logprobs: list[list[Any]] = [[None] * len(job.data) for job in self._jobs]
        self._elementwise: list[list[Any]] = [[None] * len(job.data) for job in self._jobs]
        self._waiting = deque(self._plan(self._shapes))
        self._in_flight: deque[tuple[list[tuple[int, int]], MicroBatch, Outputs]] = deque()
        self.micro_batches = len(self._waiting)
        self._largest = _largest(self._waiting)

    def step(self) -> bool:
        """Dispatch one micro-batch, and read back an earlier one; return whether the batch has ended.

        If the device runs out of memory the batch starts again, once, with smaller micro-batches.
        """
        try:
            ended = self._compute()
        except (RuntimeError, DoesNotFitError) as error:
            if not self._can_be_smaller(error):
                raise
            log.warning("with smaller micro-batches again: %s", error)
        else:
            if ended:
                self.results = [self._finish(index) for index in range(len(self._jobs))]
            return ended
        # Not in the handler, where the error still keeps the arrays of its frames alive.
        self._programs.make_way()
        self._begin()
        return False

    def close(self) -> None:
        """Do nothing: all of the batch's work is in its turns."""

    def _can_be_smaller(self, error: Exception) -> bool:
        """Return whether to start again. `_shapes` are then the next smaller ones that change the largest
        batch."""
        if not isinstance(error, DoesNotFitError):
            if "RESOURCE_EXHAUSTED" not in str(error) or self._out_of_memory:
                return False
            self._out_of_memory = True
        shapes = self._shapes.halved()
        while shapes.micro_batch_tokens > ROW_MULTIPLE_OF:
            if _largest(self._plan(shapes)) < self._largest:
                self._shapes = shapes
                return True
            shapes = shapes.halved()
        return False

    def _compute(self) -> bool:
        """Compute one turn of `step`, without what follows the last one."""
        if self._waiting:
            self._dispatch(*self._waiting.popleft())
            if len(self._in_flight) < IN_FLIGHT and self._waiting:
                return False
        if self._in_flight:
            self._read_back(*self._in_flight.popleft())
        return not (self._waiting or self._in_flight)

    def _plan(self, shapes: ShapeTable) -> list[_Planned]:
        """Return (kind, [(job, datum)] by the packing's numbers, micro-batch) of every micro-batch."""
        kinds: dict[_Kind, list[tuple[int, int]]] = {}
        for job_index, job in enumerate(self._jobs):
            full_weights = job.state.lora is None
            shared = ("full", job_index) if full_weights else structure(job.state.lora)
            for index, datum in enumerate(job.data):
                targets = _bucket_targets(datum.targets.shape[1])
                experts = None if datum.experts is None else datum.experts.shape[1:]
                kind = _Kind(shared, job.forward_only, job.loss.sequence_level, targets, experts)
                kinds.setdefault(kind, []).append((job_index, index))
        plan = []
        for kind, members in kinds.items():
            lengths = [len(self._jobs[job].data[index].tokens) for job, index in members]
            packed = pack(lengths, [job for job, _ in members], shapes, MODELS_PER_BATCH[-1])
            plan += [(kind, members, micro_batch) for micro_batch in packed]
        return plan

    def _dispatch(self, kind: _Kind, members: list[tuple[int, int]], micro_batch: MicroBatch) -> None:
        self.positions += micro_batch.num_tokens
        self.tokens += sum(segment.length for row in micro_batch.rows for segment in row.segments)
        jobs = micro_batch.groups
        n = next(size for size in MODELS_PER_BATCH if size >= len(jobs))
        states = [self._jobs[job].state for job in jobs]
        states += states[:1] * (n - len(jobs))  # no row refers to these
        batch = self._programs.put(self._batch(kind, members, micro_batch))
        if kind.forward_only:
            outputs = self._programs.run_forward(states, batch, kind.sequence_level)
        else:
            begun = [self._gradients.pop(job, None) for job in jobs] + [None] * (n - len(jobs))
            gradients = tuple(
                self._accumulation.zeros(state) if gradient is None else gradient
                for gradient, state in zip(begun, states, strict=True)
            )
            gradients, outputs = self._programs.run_gradients(states, gradients, batch, kind.sequence_level)
            self._gradients.update(zip(jobs, gradients, strict=False))
            for unused in gradients[len(jobs) :]:
                self._accumulation.recycle(states[0], unused)
        self._in_flight.append((members, micro_batch, outputs))

    def _batch(self, kind: _Kind, members: list[tuple[int, int]], micro_batch: MicroBatch) -> Batch:
        data = [self._jobs[job].data[index] for job, index in members]
        shape = (kind.targets,)
        position, start = micro_batch.positions()
        names = BATCH_INPUTS + (SEQUENCE_INPUTS if kind.sequence_level else ())
        absent = np.zeros((0, 0), np.float32)
        inputs = {}
        for name in names:
            if any(name in datum.inputs for datum in data):
                values = [datum.inputs.get(name, absent) for datum in data]
                inputs[name] = micro_batch.lay(values, shape, np.float32)
            else:
                inputs[name] = np.zeros((*position.shape, *shape), np.float32)
        adapter = np.zeros(micro_batch.num_rows, np.int32)
        loss = np.zeros(micro_batch.num_rows, np.int32)
        config = np.zeros((micro_batch.num_rows, MAX_CONFIG), np.float32)
        for at, row in enumerate(micro_batch.rows):
            job = self._jobs[row.group]
            adapter[at] = micro_batch.groups.index(row.group)
            loss[at] = LOSS_INDEX[job.loss.function]
            config[at, : len(job.chosen.config)] = job.chosen.config
        return Batch(
            tokens=micro_batch.lay([datum.tokens for datum in data], (), np.int32),
            position=position,
            start=start,
            real=micro_batch.lay([np.ones(datum.targets.shape, bool) for datum in data], shape, np.bool_),
            targets=micro_batch.lay([datum.targets for datum in data], shape, np.int32),
            inputs=inputs,
            adapter=adapter,
            loss=loss,
            config=config,
            experts=None if kind.experts is None else self._experts(data, kind.experts, micro_batch),
        )

    def _experts(
        self, data: list[TrainingDatum], shape: tuple[int, ...], micro_batch: MicroBatch
    ) -> np.ndarray:
        """Lay out the experts that the datums name, and -1 on padding."""
        above = [np.zeros((0, 0, 0), np.int16) if each.experts is None else each.experts + 1 for each in data]
        return micro_batch.lay(above, shape, np.int16) - np.int16(1)

    def _read_back(self, members: list[tuple[int, int]], micro_batch: MicroBatch, outputs: Outputs) -> None:
        loss = np.asarray(outputs.loss)
        tokens_MBE = None if outputs.expert_tokens is None else np.asarray(outputs.expert_tokens)
        for at, row in enumerate(micro_batch.rows):
            self._losses[row.group] += loss[at]
            if tokens_MBE is not None:
                self._expert_tokens[row.group] = self._expert_tokens[row.group] + tokens_MBE[:, at]
        kept = [(self._logprobs, outputs.logprobs)]
        if any(self._jobs[row.group].elementwise for row in micro_batch.rows):
            kept.append((self._elementwise, outputs.losses))
        for by_datum, array in kept:
            for number, values in micro_batch.pick(np.asarray(array)).items():
                job, index = members[number]
                shape = self._jobs[job].data[index].shape
                targets = 1 if len(shape) == 1 else shape[1]
                by_datum[job][index] = values[:, :targets].reshape(shape)

    def _finish(self, index: int) -> JobOutput | Exception:
        job, gradients = self._jobs[index], self._gradients.pop(index, None)
        try:
            self._check(index)
            output, valid_tokens = self._output(index), job.valid_tokens
            # The last step that can fail.
            if gradients is not None and not self._accumulation.add(job.state, gradients):
                raise NonFiniteError(
                    "the gradient is not finite; nothing was accumulated. "
                    "Look for extreme weights, advantages or probability ratios, or a diverged model"
                )
        except Exception as error:
            job.state.failed_since_step += not job.forward_only
            return error
        job.state.valid_tokens += 0 if job.forward_only else valid_tokens
        return output

    def _output(self, index: int) -> JobOutput:
        losses = self._laid_out(index, self._elementwise[index]) if self._jobs[index].elementwise else None
        return JobOutput(self._laid_out(index, self._logprobs[index]), self._metrics(index), losses)

    def _laid_out(self, index: int, values: list[np.ndarray]) -> list[np.ndarray]:
        """Lay out values as the client laid out its datums."""
        aligned = self._jobs[index].aligned
        if aligned is None:
            return values
        return [each.answered(of_datum) for each, of_datum in zip(aligned, values, strict=True)]

    def _check(self, index: int) -> None:
        """Raise NonFiniteError for a loss or log-probs that are not finite."""
        for at, logprobs in enumerate(self._logprobs[index]):
            if not np.isfinite(logprobs).all():
                raise NonFiniteError(
                    f"datum {at}: log-probs are not finite; nothing was accumulated. The model has diverged"
                )
        if not np.isfinite(self._losses[index]):
            raise NonFiniteError(
                f"the loss is {self._losses[index]}; nothing was accumulated. "
                "Look for extreme weights, advantages, logprobs or probability ratios"
            )

    def _metrics(self, index: int) -> dict[str, float]:
        """Return metrics whose keys have one colon, followed by the reduction with which a client combines
        chunks."""
        job = self._jobs[index]
        metrics = {
            "loss:sum": float(self._losses[index]),
            "tokens:sum": float(job.tokens),
            "valid_tokens:sum": float(job.valid_tokens),
        }
        if not isinstance(self._expert_tokens[index], int):
            metrics |= router_metrics(self._expert_tokens[index])
        return metrics | policy_metrics(job.chosen, job.data, self._logprobs[index])


def _largest(plan: Iterable[_Planned]) -> int:
    return max((micro_batch.num_tokens for _, _, micro_batch in plan), default=0)


def _bucket_targets(targets: int) -> int:
    """Round up to 1, 4, 16, 64, ..., so that there are few shapes for any number of targets per token."""
    bucket = 1
    while bucket < targets:
        bucket *= 4
    return bucket
