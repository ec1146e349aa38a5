"""A worker process of `offload.py`: reads a job and a body, answers with what the job makes of the body."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import platform
import resource
import signal
import sys
from collections.abc import Callable
from typing import BinaryIO

from .errors import TooLarge
from .offload import SIZE

_NICENESS = 5  # answering comes before parsing
_LARGE_BYTES = 4 << 20  # after a body of so much, what it took goes back to the system


def main() -> None:
    memory_bytes = int(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # service managers send it to all; the server may need us
    os.nice(_NICENESS)
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    jobs, answers = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what prints must not come between the answers
    while (job := _read(jobs)) is not None and (body := _read(jobs)) is not None:
        answer = _answer(job, body)
        answers.write(SIZE.pack(len(answer)))
        answers.write(answer)
        answers.flush()
        if len(body) > _LARGE_BYTES:
            del job, body, answer
            _give_memory_back()


def _read(file: BinaryIO) -> bytes | None:
    """The next piece; None at the end of the server."""
    head = file.read(SIZE.size)
    if len(head) < SIZE.size:
        return None
    (size,) = SIZE.unpack(head)
    piece = file.read(size)
    return piece if len(piece) == size else None


def _answer(job: bytes, body: bytes) -> bytes:
    call: Callable
    try:
        call, args, kwargs = pickle.loads(job)
        return pickle.dumps((True, call(body, *args, **kwargs)), pickle.HIGHEST_PROTOCOL)
    except MemoryError:
        error: Exception = TooLarge(
            f"the body of {len(body)} bytes takes more memory to read than it may; send less at once"
        )
    except Exception as raised:
        error = raised
    return pickle.dumps((False, error), pickle.HIGHEST_PROTOCOL)


def _give_memory_back() -> None:
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


if __name__ == "__main__":
    main()
