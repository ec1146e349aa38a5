"""Custom losses computed in processes of their own, each stopped when it has taken its seconds."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from multiprocessing.connection import Connection

import numpy as np

from .. import messages
from ..errors import UserError
from .custom_loss_messages import Failure, Task, decode_answer, encode
from .custom_losses import Differentiated

log = logging.getLogger(__name__)

DATUM_SECONDS = 10.0  # of one datum's loss and gradient, its compilation included
OPERATION_SECONDS = 120.0  # of all datums of an operation
_START_SECONDS = 120.0
_PROCESSES = 2
_POLL_SECONDS = 0.001


class CustomLossProcess:
    """One process. Its answers are polled for, so that the engine goes on meanwhile."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.custom_loss_worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
            )
        self._connection = Connection(ours.detach())
        self.began = time.monotonic()
        self.is_ready = False

    def send(self, task: Task) -> None:
        self._connection.send_bytes(encode(task))

    def receive(self, seconds: float) -> bytes | None:
        """Return what has arrived within so many seconds, if anything. Raises OSError or EOFError for a
        process that has ended."""
        return self._connection.recv_bytes() if self._connection.poll(seconds) else None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._connection.close()


class CustomLossProcesses:
    """At most a few processes, started when they are needed and kept for the next operation."""

    def __init__(self, datum_seconds: float = DATUM_SECONDS, operation_seconds: float = OPERATION_SECONDS):
        self.datum_seconds, self.operation_seconds = datum_seconds, operation_seconds
        self._idle: list[CustomLossProcess] = []
        self._leased = 0

    def lease(self) -> Generator[bool, None, Lease]:
        """Yield until a process is free."""
        while self._leased >= _PROCESSES:
            time.sleep(_POLL_SECONDS)
            yield False
        lease = Lease(self)
        self._leased += 1
        return lease

    def take(self) -> CustomLossProcess:
        return self._idle.pop() if self._idle else CustomLossProcess()

    def end(self, process: CustomLossProcess | None) -> None:
        """A lease ends; `process` is kept unless it was killed."""
        self._leased -= 1
        if process is not None:
            self._idle.append(process)


class Lease:
    """The use of one process by one operation."""

    def __init__(self, processes: CustomLossProcesses):
        self._processes = processes
        self._process: CustomLossProcess | None = None
        self.seconds = 0.0
        """What the operation's losses have taken so far."""

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self._processes.end(self._process)

    def differentiate(
        self, loss: messages.CustomLoss, logprobs: np.ndarray, inputs: dict[str, np.ndarray]
    ) -> Generator[bool, None, Differentiated]:
        """Yield while the process computes. Raises UserError for a loss that cannot be computed for these
        shapes, or takes longer than it may."""
        process = yield from self._ready()
        values = {name: _tensor(value) for name, value in ({"logprobs": logprobs} | inputs).items()}
        with self._killed_on_error():
            process.send(Task(loss, values))
            answer = decode_answer((yield from self._receive(process)))
        if isinstance(answer, Failure):
            raise UserError(answer.message) if answer.by_user else RuntimeError(answer.message)
        gradient = np.frombuffer(answer.gradient, "<f4").reshape(answer.shape)
        return Differentiated(answer.loss, gradient, answer.metrics)

    def _ready(self) -> Generator[bool, None, CustomLossProcess]:
        """A process that has started."""
        if self._process is None:
            self._process = self._processes.take()
        process = self._process
        with self._killed_on_error():
            while not process.is_ready:
                process.is_ready = process.receive(_POLL_SECONDS) is not None
                if not process.is_ready:
                    if time.monotonic() - process.began > _START_SECONDS:
                        raise TimeoutError("the process for custom losses does not start")
                    yield False
        return process

    def _receive(self, process: CustomLossProcess) -> Generator[bool, None, bytes]:
        began, before = time.monotonic(), self.seconds
        limits = self._processes.datum_seconds, self._processes.operation_seconds - before
        try:
            while (data := process.receive(_POLL_SECONDS)) is None:
                self.seconds = before + time.monotonic() - began
                if self.seconds - before > min(limits):
                    raise UserError(_too_long(self._processes, by_datum=limits[0] <= limits[1]))
                yield False
        except (EOFError, OSError):
            raise UserError("its process ended: it may have taken more memory than there is") from None
        self.seconds = before + time.monotonic() - began
        return data

    @contextlib.contextmanager
    def _killed_on_error(self) -> Iterator[None]:
        """What is under way is lost with the process; the next use starts another."""
        try:
            yield
        except BaseException:  # also GeneratorExit: the operation was cancelled
            process, self._process = self._process, None
            if process is not None:
                process.kill()
            raise


def _too_long(processes: CustomLossProcesses, by_datum: bool) -> str:
    if by_datum:
        return f"stopped after {processes.datum_seconds:g} s, the most that one datum's loss may take"
    return f"stopped after {processes.operation_seconds:g} s, the most that one operation's losses may take"


def _tensor(value: np.ndarray) -> messages.Tensor:
    array = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
    return messages.Tensor(value.dtype.name, value.shape, array.tobytes())  # type: ignore[arg-type]
