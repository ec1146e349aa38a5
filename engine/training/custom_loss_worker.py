"""A process that computes custom losses: `python -m tinsmith.engine.training.custom_loss_worker FD`.

It is separate from the engine because XLA cannot interrupt a program: a loss that takes too long, or too much
memory, is stopped by ending this process, and nothing else is lost.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from ..errors import UserError
from .custom_loss_messages import READY, Failure, Result, Task, decode_task, encode
from .custom_losses import MAX_BYTES, CustomLosses, Differentiated

_PR_SET_PDEATHSIG = 1
_NICENESS = 10  # training and sampling come first
_MAX_BYTES = 2 * MAX_BYTES  # memory for a loss's intermediate values, XLA's other allocations, and JAX


def main(descriptor: int) -> None:
    """Answer tasks one after the other, until the engine closes its end."""
    if sys.platform == "linux":  # a long program must not outlive an engine that was killed
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        Path("/proc/self/oom_score_adj").write_text("1000")  # the first process to end when memory runs out
        resource.setrlimit(resource.RLIMIT_DATA, (_MAX_BYTES, _MAX_BYTES))
    os.nice(_NICENESS)
    losses = CustomLosses()
    with Connection(descriptor) as connection:
        connection.send_bytes(READY)
        while True:
            try:
                task = decode_task(connection.recv_bytes())
            except EOFError:
                return
            connection.send_bytes(encode(_answer(losses, task)))


def _answer(losses: CustomLosses, task: Task) -> Result | Failure:
    values = {name: _array(tensor) for name, tensor in task.values.items()}
    try:
        found = losses.differentiate(task.loss, values.pop("logprobs"), values)
    except UserError as error:
        return Failure(str(error), by_user=True)
    except Exception as error:
        return Failure(f"{type(error).__name__}: {error}", by_user=False)
    return _result(found)


def _result(found: Differentiated) -> Result:
    gradient = np.ascontiguousarray(found.gradient, "<f4")
    return Result(found.loss, gradient.shape, gradient.tobytes(), found.metrics)


def _array(tensor) -> np.ndarray:
    return np.frombuffer(tensor.data, np.dtype(tensor.dtype).newbyteorder("<")).reshape(tensor.shape)


if __name__ == "__main__":
    main(int(sys.argv[1]))
