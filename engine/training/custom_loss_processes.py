"""Processes for custom losses, which owners share fairly.

A computation is the loss of one datum. An owner has one process at a time, and a few owners' processes exist
at once. Fewer still run; the others are paused. The owners that have recently computed least go first, so
that slow losses delay only each other and their owners. A computation that has used up its seconds is stopped
by ending its process.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np

from .. import messages
from ..errors import UserError
from .custom_loss_messages import Failure, Result, Task, decode_answer
from .custom_loss_process import CustomLossProcess
from .custom_losses import Differentiated

DATUM_SECONDS = 10.0  # of one datum's loss and gradient, its compilation included
OPERATION_SECONDS = 120.0  # of all datums of an operation
_PROCESSES, _RUNNING = 4, 2
_POLL_SECONDS = 0.001
_TURN_SECONDS = 0.25  # lead of one owner over another after which the other one's process runs instead
_HALF_LIFE = 60.0  # seconds in which half of what an owner has used is forgotten
# A waiting owner takes the process of one that has used more than this many seconds, and this many times more
# than itself.
_MUCH_SECONDS, _MUCH_MORE = 5.0, 4.0


@dataclass
class Account:
    """The owner of an operation, and the seconds that its losses have taken so far."""

    owner: str
    seconds: float = 0.0


class _Computation:
    """The loss of one datum, from the wait for a process to the answer."""

    def __init__(self, account: Account, task: Task):
        self.account, self.task = account, task
        self.begin_again()

    def begin_again(self) -> None:
        self.process: CustomLossProcess | None = None
        self.sent = self.runs = False
        self.seconds = 0.0  # seconds that the process has run


class CustomLossProcesses:
    """A pool of up to `processes` processes, started on demand and kept; `running` of them run at once."""

    def __init__(
        self,
        datum_seconds: float = DATUM_SECONDS,
        operation_seconds: float = OPERATION_SECONDS,
        processes: int = _PROCESSES,
        running: int = _RUNNING,
    ):
        self.datum_seconds, self.operation_seconds = datum_seconds, operation_seconds
        self._most, self._most_running = processes, running
        self._idle: list[CustomLossProcess] = []
        self._computations: list[_Computation] = []  # in the order of arrival
        self._used: dict[str, float] = {}  # seconds by owner, half of them forgotten every _HALF_LIFE
        self._charged_until = time.monotonic()

    def differentiate(
        self,
        account: Account,
        loss: messages.CustomLoss,
        logprobs: np.ndarray,
        inputs: dict[str, np.ndarray],
    ) -> Generator[bool, None, Differentiated]:
        """Compute one datum's loss, and yield meanwhile. Its seconds are added to the account.

        Raises UserError for a loss that cannot be computed for these shapes, or takes longer than it may.
        """
        values = {name: _tensor(value) for name, value in ({"logprobs": logprobs} | inputs).items()}
        computation = _Computation(account, Task(loss, values))
        self._charge()
        self._computations.append(computation)
        answered = False
        try:
            while (answer := self._poll(computation)) is None:
                yield False
            answered = True
        finally:  # reached also if the operation is cancelled or the computation stopped: its process ends
            self._charge()
            self._computations.remove(computation)
            if computation.process is not None:
                self._take_back(computation.process, answered)
        if isinstance(answer, Failure):
            raise UserError(answer.message) if answer.by_user else RuntimeError(answer.message)
        gradient = np.frombuffer(answer.gradient, "<f4").reshape(answer.shape)
        return Differentiated(answer.loss, gradient, answer.metrics)

    def _poll(self, computation: _Computation) -> Result | Failure | None:
        """Return the computation's answer if there is one. Raises UserError when its seconds are over."""
        self._charge()
        self._assign()
        seconds = _POLL_SECONDS / len(self._computations)
        process = computation.process
        if process is None:
            time.sleep(seconds)
            return None
        if not process.has_started(seconds):
            return None
        try:
            if not computation.sent:
                process.send(computation.task)
                computation.sent = True
            if (data := process.receive(seconds)) is not None:
                return decode_answer(data)
        except (EOFError, OSError):
            raise UserError("its process ended: it may have taken more memory than there is") from None
        if computation.seconds > self.datum_seconds:
            raise UserError(_too_long(self.datum_seconds, "datum's loss"))
        if computation.account.seconds > self.operation_seconds:
            raise UserError(_too_long(self.operation_seconds, "operation's losses"))
        return None

    def _charge(self) -> None:
        """Charge the time since the last call to the computations that have run meanwhile."""
        now = time.monotonic()
        elapsed, self._charged_until = now - self._charged_until, now
        left = 0.5 ** (elapsed / _HALF_LIFE)
        self._used = {owner: used * left for owner, used in self._used.items() if used > 0.001}
        for computation in self._computations:
            if computation.runs:
                computation.seconds += elapsed
                account = computation.account
                account.seconds += elapsed
                self._used[account.owner] = self._seconds_of(account.owner) + elapsed

    def _assign(self) -> None:
        """Give processes to computations that wait for one, and let those of the least use run."""
        order = sorted(self._computations, key=lambda each: self._use(each) // _TURN_SECONDS)
        served = {each.account.owner: each for each in order if each.process is not None}
        for each in order:
            owner = each.account.owner
            if owner in served:
                continue
            if len(served) == self._most and not self._evict_for(each, served):
                break
            each.process = self._process_for(owner)
            served[owner] = each
        started = [each for each in order if each.process is not None and each.sent]
        for place, each in enumerate(started):
            assert each.process is not None
            each.runs = place < self._most_running
            each.process.run(each.runs)

    def _evict_for(self, waiting: _Computation, served: dict[str, _Computation]) -> bool:
        """Free the place of the owner with the most use if `waiting` should have it.

        That owner's computation waits for another process, and starts again.
        """
        evicted = max(served.values(), key=self._use)
        if self._use(evicted) < max(_MUCH_SECONDS, _MUCH_MORE * self._use(waiting)):
            return False
        del served[evicted.account.owner]
        assert evicted.process is not None
        self._take_back(evicted.process, usable=not evicted.sent)
        evicted.begin_again()
        return True

    def _process_for(self, owner: str) -> CustomLossProcess:
        """Take the idle process that has compiled the owner's losses, start one if there may be another, or
        take the one that has been idle for longest."""
        process = next((each for each in self._idle if each.last_owner == owner), None)
        serving = sum(each.process is not None for each in self._computations)
        if process is None and serving + len(self._idle) < self._most:
            process = CustomLossProcess()
        elif process is None:
            process = self._idle[0]
        if process in self._idle:
            self._idle.remove(process)
        process.last_owner = owner
        return process

    def _take_back(self, process: CustomLossProcess, usable: bool) -> None:
        if usable:
            process.run(True)
            self._idle.append(process)
        else:
            process.kill()

    def _use(self, computation: _Computation) -> float:
        return self._seconds_of(computation.account.owner)

    def _seconds_of(self, owner: str) -> float:
        return self._used.get(owner, 0.0)


def _too_long(seconds: float, what: str) -> str:
    return f"stopped after {seconds:g} s, the most that one {what} may take"


def _tensor(value: np.ndarray) -> messages.Tensor:
    array = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
    return messages.Tensor(value.dtype.name, value.shape, array.tobytes())  # type: ignore[arg-type]
