"""The engine's loop: receive, schedule, run one unit of work, answer.

One thread computes. Each pass looks at the socket, gives one turn to training (a micro-batch, or a whole
short operation) and one to the sampler of each base model (a prefill or decode chunk), so that neither waits
long for the other.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial

from . import messages
from .answers import answer_to, forward_backward_output, note
from .base_models import BaseModel
from .errors import MissingWeights, UserError
from .measurements import Measurements
from .memory_report import MemoryReport
from .models import Models, Writing
from .sampling.sampler_cache import SamplerCache
from .scheduler import ModelOperation, Scheduler, Unit
from .sleep import Sleep
from .socket import Socket
from .tenants import Tenants
from .training.custom_loss_batch import CustomJob
from .training.custom_losses import check
from .training.device_batch import Job, JobOutput
from .under_way import UnderWay

log = logging.getLogger(__name__)

Request = messages.ToEngine
_LOOK_SECONDS = 0.001  # between checks whether a write that holds its model has ended
CheckedOperation = tuple[messages.ForwardBackward, Job | CustomJob]


@dataclass(frozen=True)
class Written:
    """Posted to the inbox when an answer that waited for the disk has been sent."""


class Engine:
    """Answers every request exactly once, with Done or Failed."""

    def __init__(
        self,
        config: messages.EngineConfig,
        bases: dict[str, BaseModel],
        socket: Socket,
        measurements: Measurements | None = None,
    ):
        self._socket = socket
        self._measurements = measurements or Measurements(socket.send)
        base = next(iter(bases.values()))
        on_cpu = base.mesh.devices.flat[0].platform == "cpu"
        tenants = Tenants(
            base.memory.budget, lambda model_id: self._scheduler.is_running(model_id), not on_cpu
        )
        self._models = Models(config, bases, tenants)
        self._memory = MemoryReport(
            base.memory, tenants, (each.trainer.programs for each in bases.values()), socket.send
        )
        # Several names may share a base; take each base once.
        self._samplers = list(dict.fromkeys(base.samplers for base in bases.values()))
        micro_batch = max(base.trainer.shapes.micro_batch_tokens for base in bases.values())
        self._scheduler = Scheduler(self._batch_key, micro_batch)
        self._sampling: dict[str, tuple[SamplerCache, messages.Sample]] = {}
        # Samples that wait for a queued save of their weights, by its directory, as in a replay.
        self._awaiting: dict[str, list[messages.Sample]] = {}
        self._writing = 0
        self._stops: list[messages.Stop] = []
        self._under_way = UnderWay(config.under_way)
        shared = list({id(base.trainer): base for base in bases.values()}.values())
        self._sleep = Sleep(shared, self._models, self._accept, self._answer)

    def run(self) -> None:
        """Run until a Stop, and then until everything that was accepted is done and on disk."""
        while self._busy or self._writing or self._sleep.under_way or not self._stops:
            self._receive()
            if self._sleep.under_way and not self._busy:
                self._sleep.fall_asleep()
            if unit := self._scheduler.next():
                self._train(unit)
            for samplers in () if self._sleep.asleep else self._samplers:
                if samplers.sampler.has_work:
                    self._sample(samplers)
        self._models.close()
        for stop in self._stops:
            self._answer(stop, messages.Nothing())

    # --- receive ------------------------------------------------------------------------------------------

    @property
    def _busy(self) -> bool:
        return bool(self._scheduler or self._sampling)

    def _receive(self) -> None:
        """Take what has arrived; wait if there is nothing else to do."""
        while True:
            idle = not self._busy and not self._sleep.under_way
            may_wait = idle and (self._writing or not self._stops)
            self._memory.send(bool(may_wait), self._sleep.asleep, self._sleep.bytes_waiting)
            if may_wait:
                self._under_way.note(())
            until_idle = [samplers.evict_idle() for samplers in self._samplers]
            until = [*until_idle, self._measurements.report(self._gauges)]
            timeout = min((seconds for seconds in until if seconds is not None), default=None)
            try:
                self._accept(self._socket.inbox.get(block=bool(may_wait), timeout=timeout))
                self._measurements.touch()
            except queue.Empty:
                if not may_wait:
                    return

    def _gauges(self) -> dict[str, float]:
        samplers = [] if self._sleep.asleep else [each.sampler for each in self._samplers]
        used = sum(sampler.used_pages for sampler in samplers)
        free = sum(sampler.free_pages for sampler in samplers)
        return {"kv_pages/used": float(used), "kv_pages/free": float(free)}

    def _accept(self, request: Request | Written) -> None:
        if not isinstance(request, Written) and self._sleep.takes(request):
            return
        match request:
            case messages.Sleep() | messages.WakeUp():
                pass  # excluded by `Sleep.takes`
            case messages.Sample():
                self._add_sample(request)
            case messages.Cancel():
                self._cancel(request)
            case messages.ExportWeights():
                self._answer_to(request, partial(self._models.export, request))
            case messages.CheckCustomLoss():
                self._answer_to(request, partial(check, request.loss))
            case messages.ReleaseSampler():
                for samplers in self._samplers:
                    samplers.release(request.weights)
                self._answer(request, messages.Nothing())
            case messages.Stop():
                self._socket.send(messages.Status("stopping", "finishing what is running and queued"))
                self._stops.append(request)
            case Written():
                self._writing -= 1
            case messages.SaveSampler(deferred=True):
                self._awaiting.setdefault(request.directory, [])
                self._scheduler.add(request)
            case _:
                self._scheduler.add(request)

    def _cancel(self, request: messages.Cancel) -> None:
        cancelled: Request | None = self._scheduler.cancel(request.target)
        if request.target in self._sampling:
            samplers, cancelled = self._sampling.pop(request.target)
            samplers.sampler.cancel(request.target)
        for waiting in self._awaiting.values():
            if sample := next((each for each in waiting if each.request_id == request.target), None):
                waiting.remove(sample)
                cancelled = sample
        if cancelled is not None:
            self._answer(cancelled, UserError("cancelled"))
            if isinstance(cancelled, messages.SaveSampler):
                self._add_awaiting(cancelled)
        self._answer(request, messages.Nothing())

    # --- train --------------------------------------------------------------------------------------------

    def _batch_key(self, operation: ModelOperation) -> Hashable | None:
        """Return the key of operations that may share a device batch; None: runs alone.

        Adapters of one shape on one base can share. Full weights cannot, and a slow custom loss would hold up
        the others.
        """
        model = self._models.peek(operation.model_id)
        if not isinstance(operation, messages.ForwardBackward) or model is None or model.state.lora is None:
            return None
        if operation.loss_fn == "custom":
            return None
        structure = model.base.trainer.structure(model.state)
        return model.base.trainer, structure, operation.forward_only

    def _train(self, unit: Unit) -> None:
        """Give a unit one turn."""
        unit.turn_began = time.perf_counter()
        self._under_way.note(unit.operations)
        if unit.progress is None:
            first = unit.operations[0]
            is_batch = isinstance(first, messages.ForwardBackward)
            unit.progress = self._forward_backward(unit) if is_batch else self._run(unit, first)
        next(unit.progress, None)
        unit.seconds += time.perf_counter() - unit.turn_began

    def _run(self, unit: Unit, operation: ModelOperation) -> Iterator[None]:
        """Run an operation that takes one turn."""
        outcome: messages.Output | Writing | Exception
        try:
            outcome = self._models.run(operation)
        except Exception as error:
            outcome = error
        while isinstance(outcome, Writing) and outcome.holds_model and not outcome.size_bytes.done():
            wait([outcome.size_bytes], _LOOK_SECONDS)
            yield
        self._finish(unit, operation, outcome)
        yield

    def _forward_backward(self, unit: Unit) -> Iterator[None]:
        """Run the operations of a unit together, one micro-batch per turn."""
        batch: list[CheckedOperation] = []
        for operation in list(unit.operations):
            assert isinstance(operation, messages.ForwardBackward)
            try:
                batch.append((operation, self._models.job(operation)))
            except Exception as error:
                self._finish(unit, operation, error)
        if not batch:
            return
        try:
            results = yield from self._compute(unit, batch)
        except Exception as error:
            if len(batch) == 1:
                self._finish_forward_backward(unit, batch[0], self._failed(batch[0], error))
                return
            log.exception("a batch of %d models failed; each is tried alone", len(batch))
        else:
            for each, result in zip(batch, results, strict=True):
                self._finish_forward_backward(unit, each, result)
            return
        for each in batch:
            try:
                (result,) = yield from self._compute(unit, [each])
            except Exception as error:
                result = self._failed(each, error)
            self._finish_forward_backward(unit, each, result)

    def _compute(
        self, unit: Unit, batch: list[CheckedOperation]
    ) -> Generator[None, None, Sequence[JobOutput | Exception]]:
        """Return one output or error per operation. If it raises, no gradient was added."""
        trainer = self._models.find(batch[0][0].model_id).base.trainer
        run = trainer.start([job for _, job in batch])
        try:
            while not run.step():
                yield
        finally:  # even if the operation is cancelled
            run.close()
            unit.seconds += run.seconds_beside
            self._measurements.add("training_positions/token", run.tokens)
            self._measurements.add("training_positions/padding", run.positions - run.tokens)
        return run.results

    def _failed(self, checked: CheckedOperation, error: Exception) -> Exception:
        operation, job = checked
        job.state.failed_since_step += not operation.forward_only
        return error

    def _finish_forward_backward(
        self, unit: Unit, checked: CheckedOperation, result: JobOutput | Exception
    ) -> None:
        outcome = forward_backward_output(result) if isinstance(result, JobOutput) else result
        self._finish(unit, checked[0], outcome)

    def _finish(
        self, unit: Unit, operation: ModelOperation, outcome: messages.Output | Writing | Exception
    ) -> None:
        """Answer an operation, now or once it is on disk, and let the operations behind it run."""
        self._scheduler.finish(operation)
        seconds = unit.seconds + time.perf_counter() - unit.turn_began
        if isinstance(outcome, Writing):
            self._answer_written(operation, outcome, seconds)
            return
        self._answer(operation, outcome, seconds)
        if isinstance(operation, messages.SaveSampler):
            self._add_awaiting(operation)

    def _answer_to(self, request: Request, outcome: Callable[[], messages.Output | Writing]) -> None:
        """Answer a request without a turn, which is short or continues in the background."""
        try:
            found = outcome()
        except Exception as error:
            self._answer(request, error)
            return
        if isinstance(found, Writing):
            self._answer_written(request, found)
        else:
            self._answer(request, found)

    def _answer_written(self, request: Request, writing: Writing, seconds: float = 0.0) -> None:
        """Answer once the weights are on disk."""

        def answer(size: Future[int]) -> None:  # called in the writing thread
            error = size.exception()
            self._answer(request, error or writing.output(size.result()), seconds)
            self._socket.post(Written())

        self._writing += 1
        writing.size_bytes.add_done_callback(answer)

    # --- sample -------------------------------------------------------------------------------------------

    def _add_sample(self, request: messages.Sample) -> None:
        try:
            samplers = self._models.base(request.sampler.base_model).samplers
            samplers.add(request)
        except Exception as error:
            directory = request.sampler.weights
            if isinstance(error, MissingWeights) and directory in self._awaiting:
                self._awaiting[directory].append(request)
            else:
                self._answer(request, error)
        else:
            self._sampling[request.request_id] = samplers, request

    def _add_awaiting(self, save: messages.SaveSampler) -> None:
        """Add the samples that waited for a save, which has ended."""
        for request in self._awaiting.pop(save.directory, []):
            self._add_sample(request)

    def _sample(self, samplers: SamplerCache) -> None:
        """Give the sampler one turn. If it fails, its requests fail and it starts again empty."""
        try:
            answers = samplers.sampler.step(self._under_way.note)
        except Exception as error:
            lost = [request for of, request in self._sampling.values() if of is samplers]
            for request in lost:
                del self._sampling[request.request_id]
                self._answer(request, error)
            samplers.restart()
            return
        used, empty = samplers.sampler.take_slot_counts()
        self._measurements.add("decode_slots/used", used)
        self._measurements.add("decode_slots/empty", empty)
        for drawn in samplers.sampler.drawn():
            self._socket.send(drawn)
        for answer in answers:
            _, request = self._sampling.pop(answer.request_id)
            self._socket.send(answer)
            note(request, answer)

    # --- answer -------------------------------------------------------------------------------------------

    def _answer(
        self, request: Request, outcome: messages.Output | BaseException, seconds: float = 0.0
    ) -> None:
        answer = answer_to(request, outcome, seconds)
        self._socket.send(answer)
        note(request, answer)
