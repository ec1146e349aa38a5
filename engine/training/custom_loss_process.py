"""The engine's side of one process that computes custom losses."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.connection import Connection

from .custom_loss_messages import Task, encode

_START_SECONDS = 120.0


class CustomLossProcess:
    """A process of `custom_loss_worker`. The engine polls for its answers, and goes on with other work."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.custom_loss_worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | _environment(),
            )
        self._connection = Connection(ours.detach())
        self._began = time.monotonic()
        self._started = False
        self._paused = False
        self.last_owner: str | None = None
        """The owner whose losses it has compiled last."""

    def has_started(self, seconds: float) -> bool:
        """Wait up to so many seconds for the process to start. Raises TimeoutError if it takes far too long,
        and OSError or EOFError if it has ended."""
        if not self._started:
            self._started = self.receive(seconds) is not None
            if not self._started and time.monotonic() - self._began > _START_SECONDS:
                raise TimeoutError("the process for custom losses does not start")
        return self._started

    def send(self, task: Task) -> None:
        self._connection.send_bytes(encode(task))

    def receive(self, seconds: float) -> bytes | None:
        """Return the message that arrives within so many seconds, if any. Raises OSError or EOFError for a
        process that has ended."""
        if not self._connection.poll(seconds):
            return None
        self.run(True)  # it may have been paused in the middle of a message
        return self._connection.recv_bytes()

    def run(self, runs: bool) -> None:
        """Let the process compute, or pause it."""
        if runs == self._paused:
            self._process.send_signal(signal.SIGCONT if runs else signal.SIGSTOP)
            self._paused = not runs

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._connection.close()


def _environment() -> dict[str, str]:
    """Return the environment of a process: JAX on the CPU.

    XLA must not fold constants while it compiles: a cumulative sum of a million constants would take minutes
    instead of milliseconds.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_disable_hlo_passes=constant_folding"
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
