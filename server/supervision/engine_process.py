"""One engine's process, from its start to its end, and the socket to it.

The server binds a ZeroMQ socket on a private ipc path, starts `python -m tinsmith.engine` and hands it its
configuration on standard input. Messages go out by way of the outbox and are kept until the engine reads
them, so it may still be loading. A process that ends by itself is dead: nothing is sent
any more, and what was on its way stays unanswered in the ledger, for the next one (supervisor.py). One that
gives no sign of life for `silence_seconds` is stopped, or hangs; it is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from ...engine import messages, xla_flags
from ...engine.device_catalogue import GPU_SHARE
from ..errors import Unavailable
from .outbox import Lane, Outbox

log = logging.getLogger("tinsmith.engine_process")


def _die_with_parent() -> Callable[[], None] | None:
    """Make the engine die with the server, on Linux, so that it does not keep the accelerator."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG


# XLA allocates a program's buffers anew for every execution on a CPU. By glibc's defaults each is mapped and
# page-faulted again (50 MB written in 21 ms, with these in 4 ms), and a step takes 10 to 20 % longer.
_GLIBC_TUNABLES = ":".join(
    (
        "glibc.malloc.hugetlb=1",
        "glibc.malloc.mmap_threshold=4294967296",
        "glibc.malloc.trim_threshold=4294967296",
        "glibc.malloc.top_pad=67108864",
    )
)


def engine_environment() -> dict[str, str]:
    """Return the engine's environment variables: the server's, and settings that the user has not made.

    They are about memory allocators and, on NVIDIA's GPUs, deterministic operations.
    """
    tunables = {"GLIBC_TUNABLES": _GLIBC_TUNABLES} if platform.libc_ver()[0] == "glibc" else {}
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": str(GPU_SHARE)} | tunables | os.environ
    if Path("/dev/nvidiactl").exists():
        environment["XLA_FLAGS"] = xla_flags.deterministic(environment.get("XLA_FLAGS", ""))
    return environment


class Silence:
    """Measures how long something has been silent, by the time in which its listener was awake.

    A listener that was stopped, or whose machine was suspended, has heard nothing and must not conclude that
    there was nothing to hear. So time counts only as far as the listener looks at the clock, which it should
    do every `look_seconds`: a longer gap between two looks counts as two of the usual ones.
    """

    def __init__(self, look_seconds: float, clock: Callable[[], float] = time.monotonic):
        self._look_seconds = look_seconds
        self._clock = clock
        self._looked_at = clock()
        self.seconds = 0.0

    def heard(self) -> None:
        self.seconds = 0.0

    def look(self) -> None:
        now = self._clock()
        self.seconds += min(now - self._looked_at, 2 * self._look_seconds)
        self._looked_at = now


async def nothing_stored(_request_id: str) -> None:
    """Return no payload, for an engine that needs none."""


_COPIED_BYTES = 64 << 10  # copying a smaller message is faster than sharing it with ZeroMQ
_LAST_ANSWERS_SECONDS = 0.05  # what it sent before its end may still be in the socket
# Before it is ready, an engine reads from disks that may be slow, and may hold Python's lock meanwhile.
_LOADING_MAY_TAKE = 5


class EngineProcess:
    """An engine's process, with what waits to be sent to it in `outbox`."""

    def __init__(
        self,
        config: messages.EngineConfig,
        on_answer: Callable[[messages.Done | messages.Failed, bytes], None],
        on_drawn: Callable[[messages.Drawn], None],
        silence_seconds: float,
        module: str = "tinsmith.engine",
        inherited: tuple[int, ...] = (),
        load: Callable[[str], Awaitable[bytes | None]] = nothing_stored,
        on_lost: Callable[[str, str, str], None] = lambda _request_id, _model_id, _why: None,
    ):
        """`on_answer` gets every answer that `request` is not waiting for, and its encoded message.

        `on_drawn` gets tokens of samples before their answers; `load` and `on_lost` are those of the outbox.
        """
        self._config = config
        self._silence_seconds = silence_seconds
        self._silence = Silence(config.beat_seconds)
        self._module = module
        self._inherited = inherited
        self._on_answer = on_answer
        self._on_drawn = on_drawn
        self.outbox = Outbox(load, self._send_now, on_lost)
        self._requests: dict[str, asyncio.Future[messages.Done | messages.Failed]] = {}
        self._tasks: list[asyncio.Task] = []
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False
        self.measured = messages.Measured({}, {})  # the newest
        self.phase = "starting"  # then those of messages.Status, `dead` or `stopped`
        self._news = "starting the engine"
        self._since = time.monotonic()
        self.memory: messages.Memory | None = None  # as the engine reported it last
        self.ready = asyncio.Event()
        self.ended = asyncio.Event()
        self.alive = False  # started, and not ended
        self.death: str | None = None  # how it ended, if it did by itself
        self._killed_for: str | None = None
        self.refused = False  # it ended with an error message instead of becoming ready
        self.was_ready = False
        self.has_answered = False

    async def start(self) -> None:
        self._directory = tempfile.mkdtemp(prefix="tinsmith-")  # readable by this user only
        address = f"ipc://{self._directory}/engine"
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.bind(address)
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            self._module,
            stdin=asyncio.subprocess.PIPE,
            env=engine_environment(),
            start_new_session=True,  # Ctrl-C is for the server, which then stops the engine in order
            preexec_fn=_die_with_parent(),
            pass_fds=self._inherited,
        )
        config = msgspec.structs.replace(
            self._config, address=address, under_way=f"{self._directory}/under_way"
        )
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode(config))
            self._process.stdin.write_eof()
        except (BrokenPipeError, ConnectionResetError):
            log.debug("the engine ended before it read its configuration")
        self.alive = True
        self._tasks = [
            asyncio.create_task(self.outbox.run_forever()),
            asyncio.create_task(self._receive_forever()),
            asyncio.create_task(self._watch()),
            asyncio.create_task(self._listen_for_silence()),
        ]

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def under_way(self) -> list[tuple[str, str]]:
        """Return the requests that the engine computes, or did when it died.

        Each is its id and its model's, which is empty for a request without a model.
        """
        try:
            noted = (Path(self._directory) / "under_way").read_bytes()
        except FileNotFoundError:
            return []
        lines = noted.partition(b"\0")[0].decode().splitlines()
        return [
            (request_id, model_id) for request_id, _, model_id in (line.partition("\t") for line in lines)
        ]

    async def request(self, message: messages.ToEngine) -> messages.Done | messages.Failed:
        """Send a message of the server's own and wait for the answer. Raises Unavailable on death.

        A message that concerns a model has its turn after the model's operations. `Sleep` is sent when
        everything before it has been sent.
        """
        if not self.alive:
            raise Unavailable("the engine is not running")
        answer: asyncio.Future = asyncio.get_running_loop().create_future()
        self._requests[message.request_id] = answer
        encoded, model_id = messages.encode(message), getattr(message, "model_id", "")
        if model_id:
            self.outbox.put(Lane(model_id), message.request_id, len(encoded), encoded)
        elif isinstance(message, messages.Sleep):
            await self._once_sent(message)
        else:
            self.outbox.put_own(encoded)
        return await answer

    async def _once_sent(self, message: messages.ToEngine) -> None:
        """Send a message that must not overtake what waits."""
        sent = asyncio.ensure_future(self.outbox.until_sent())
        ended = asyncio.ensure_future(self.ended.wait())
        await asyncio.wait((sent, ended), return_when=asyncio.FIRST_COMPLETED)
        sent.cancel()
        ended.cancel()
        if self.alive:
            self.outbox.put_own(messages.encode(message))

    def kill(self) -> None:
        self._stopping = True
        if self._process is not None and self.alive:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def stop(self, patience_seconds: float) -> None:
        """Let the engine finish what it has, then end it. Idle or not yet loaded, it ends at once."""
        self._stopping = True
        if self._process is not None and self.alive:
            if self.ready.is_set():
                try:
                    async with asyncio.timeout(patience_seconds):
                        await self._once_sent(messages.Stop(request_id="stop"))
                        await self.ended.wait()
                except TimeoutError:
                    log.warning("the engine did not finish within %.0f s; ending it", patience_seconds)
            if self.alive:
                self._process.kill()
                await self.ended.wait()
        await self.close()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._socket.close()
        self._context.term()
        shutil.rmtree(Path(self._directory), ignore_errors=True)

    async def _send_now(self, message: bytes) -> None:
        await self._socket.send(message, copy=len(message) < _COPIED_BYTES)

    async def _receive_forever(self) -> None:
        while True:
            frame = await self._socket.recv()
            try:
                message = messages.decode_from_engine(frame)
            except (msgspec.DecodeError, msgspec.ValidationError):
                log.exception("the engine sent %d bytes that are not a message", len(frame))
                continue
            self._silence.heard()
            match message:
                case messages.Done() | messages.Failed():
                    self.has_answered = True
                    if (answer := self._requests.pop(message.request_id, None)) is None:
                        self._on_answer(message, frame)
                    else:
                        self.outbox.answered(message.request_id)
                        if not answer.done():
                            answer.set_result(message)
                case messages.Drawn():
                    self.has_answered = True
                    self._on_drawn(message)
                case messages.Status(phase=phase, text=text):
                    self._now(phase, text)
                    log.debug("engine: %s: %s", phase, text)  # it logs them itself
                    if phase == "ready":
                        self.ready.set()
                        self.was_ready = True
                case messages.Memory():
                    self.memory = message
                case messages.Measured():
                    self.measured = message

    def _now(self, phase: str, text: str) -> None:
        self.phase, self._news, self._since = phase, text, time.monotonic()

    @property
    def text(self) -> str:
        """Say what the engine is doing, for people; of a compilation, also how long it has taken so far."""
        seconds = time.monotonic() - self._since
        return f"{self._news}, for {seconds:.0f} s" if self.phase == "compiling" else self._news

    def take_counters(self) -> dict[str, float]:
        """Return what the engine has counted, and begin at 0 again."""
        counters, self.measured = self.measured.counters, messages.Measured({}, {})
        return counters

    async def _listen_for_silence(self) -> None:
        assert self._process is not None
        while self.alive and self._killed_for is None:
            await asyncio.sleep(self._config.beat_seconds)
            self._silence.look()
            limit = self._silence_seconds * (1 if self.was_ready else _LOADING_MAY_TAKE)
            if self.alive and self._silence.seconds > limit:
                self._killed_for = f"no sign of life for {self._silence.seconds:.0f} s"
                log.error("the engine is killed: %s", self._killed_for)
                self._process.kill()

    async def _watch(self) -> None:
        assert self._process is not None
        started_at = time.monotonic()
        code = await self._process.wait()
        await asyncio.sleep(_LAST_ANSWERS_SECONDS)
        self.ready.clear()
        self.alive = False
        self.ended.set()
        if self._stopping:
            self._now("stopped", "the engine has ended")
        else:
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            if self._killed_for is not None:
                how += f" ({self._killed_for})"
            self.refused = code > 0 and not self.was_ready
            self.death = f"it ended with {how} after {time.monotonic() - started_at:.0f} s"
            self._now("dead", self.death)
            log.error("the engine is dead: %s", self.death)
        for answer in self._requests.values():
            if not answer.done():
                answer.set_exception(Unavailable("the engine is not running"))
        self._requests.clear()
