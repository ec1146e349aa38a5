"""Work that would hold up the event loop, done in threads or worker processes.

Threads are for calls that release Python's global interpreter lock, as the tokenizer's do. Parsing JSON or
protobuf holds the lock, so a thread would not help: large bodies are parsed in worker processes, which start
with the first one. Each owner has one turn at a time of either kind, so that one owner's work does not keep
out the others'.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import pickle
import platform
import resource
import signal
import struct
import sys
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import BinaryIO, Concatenate, ParamSpec, TypeVar

from .errors import TooLarge, Unavailable

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger("tinsmith.offload")

INLINE_BYTES = 64 << 10
"""A body up to this size is parsed on the event loop: it takes a few milliseconds."""
JOB_SECONDS = 120.0
_PROCESSES = 2
_THREADS = 2
_PIECE_BYTES = 1 << 20
SIZE = struct.Struct("<Q")


@dataclass
class _Turn:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    wanted_by: int = 0


class Offload:
    """The threads and worker processes. `memory_bytes`: how much memory a process may use."""

    def __init__(self, memory_bytes: int, job_seconds: float = JOB_SECONDS):
        self._memory_bytes = memory_bytes
        self._job_seconds = job_seconds
        self._threads = ThreadPoolExecutor(_THREADS, "offload")
        self._turns: dict[tuple[str, str], _Turn] = {}
        self._places = asyncio.Semaphore(_PROCESSES)
        self._idle: list[_Worker] = []
        self._closed = False

    async def in_thread(self, owner: str, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what `call` returns. It should release the interpreter's lock wherever it is slow."""
        async with self._turn("thread", owner):
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, partial(call, *args, **kwargs))

    async def in_process(
        self,
        owner: str,
        call: Callable[Concatenate[bytes, P], T],
        body: list[bytes],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Return what `call(body, ...)` returns in a worker, or raise what it raises.

        The body is given in the pieces that it came in: to join 50 MiB of them takes a tenth of a second.
        `call` is a module's function; arguments and results are pickled. Raises TooLarge for a body that
        takes more memory or time than a worker has.
        """
        job = pickle.dumps((call, args, kwargs), pickle.HIGHEST_PROTOCOL)
        async with self._turn("process", owner), self._places:
            worker = self._idle.pop() if self._idle else await _Worker.start(self._memory_bytes)
            try:
                answer = await asyncio.wait_for(worker.run(job, body), self._job_seconds)
            except (
                BaseException
            ) as error:  # including a cancelled request, whose worker is in the middle of a job
                worker.kill()
                if isinstance(error, TimeoutError | OSError | asyncio.IncompleteReadError):
                    size = sum(map(len, body))
                    log.warning("a worker was ended over a body of %d bytes: %r", size, error)
                    raise TooLarge(
                        f"the body of {size} bytes takes more memory or time to read than is allowed; send "
                        "less at once"
                    ) from None
                raise
            if self._closed:
                worker.kill()
            else:
                self._idle.append(worker)
        done, result = pickle.loads(answer)
        if not done:
            raise result
        return result

    def close(self) -> None:
        self._closed = True
        for worker in self._idle:
            worker.kill()
        self._idle.clear()
        self._threads.shutdown(wait=False, cancel_futures=True)

    @asynccontextmanager
    async def _turn(self, kind: str, owner: str) -> AsyncIterator[None]:
        turn = self._turns.setdefault((kind, owner), _Turn())
        turn.wanted_by += 1
        try:
            async with turn.lock:
                yield
        finally:
            turn.wanted_by -= 1
            if not turn.wanted_by:
                del self._turns[kind, owner]


class _Worker:
    """One worker process, which runs `main`. It ends with its standard input, at the latest with the
    server."""

    def __init__(self, process: asyncio.subprocess.Process):
        self._process = process

    @staticmethod
    async def start(memory_bytes: int) -> _Worker:
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tinsmith.server.offload", str(memory_bytes)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=_PIECE_BYTES,
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C must reach only the server
            )
        except OSError as error:
            raise Unavailable(f"no process can be started to read the body: {error.strerror}") from None
        return _Worker(process)

    async def run(self, job: bytes, body: list[bytes]) -> bytes:
        """Return the pickled answer. Raises OSError or IncompleteReadError if the worker dies."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(SIZE.pack(len(job)) + job + SIZE.pack(sum(map(len, body))))
        for piece in body:
            self._process.stdin.write(piece)
            await self._process.stdin.drain()
        (size,) = SIZE.unpack(await self._process.stdout.readexactly(SIZE.size))
        return await self._process.stdout.readexactly(size)

    def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()


# --- in the worker process: read a job and a body, answer with what the job makes of the body

_NICENESS = 5  # answering comes before parsing
_LARGE_BYTES = 4 << 20  # after a larger body, memory is given back to the system


def main() -> None:
    memory_bytes = int(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(
        signal.SIGTERM, signal.SIG_IGN
    )  # service managers send it to all processes, and the server may still need this one
    os.nice(_NICENESS)
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    jobs, answers = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # printed text must not come between the answers
    while (job := _read(jobs)) is not None and (body := _read(jobs)) is not None:
        answer = _answer(job, body)
        answers.write(SIZE.pack(len(answer)))
        answers.write(answer)
        answers.flush()
        if len(body) > _LARGE_BYTES:
            del job, body, answer
            _give_memory_back()


def _read(file: BinaryIO) -> bytes | None:
    """Read the next piece; None once the server has ended."""
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
            f"the body of {len(body)} bytes takes more memory to read than is allowed; send less at once"
        )
    except Exception as raised:
        error = raised
    return pickle.dumps((False, error), pickle.HIGHEST_PROTOCOL)


def _give_memory_back() -> None:
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


if __name__ == "__main__":
    main()
