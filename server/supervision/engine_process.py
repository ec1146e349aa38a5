"""One engine's process, from its start to its end, the socket to it, and the outbox of messages for it.

The server binds a ZeroMQ socket on a private ipc path, starts `python -m tinsmith.engine` and hands it its
configuration on standard input. Messages go out by way of the outbox and are kept until the engine reads
them, so it may still be loading. A process that ends by itself is dead: nothing is sent
any more, and what was on its way stays unanswered in the ledger, for the next one (supervisor.py). One that
gives no sign of life for `silence_seconds` is stopped, or hangs; it is killed.

The outbox keeps messages in order within a lane, serves lanes by turns, and sends few bytes at a time. A lane
is a model, or a tenant's samples. Operations wait here by their ids alone; a payload is read when it is sent,
and it is sent when few bytes are unanswered. So neither process holds the payloads of a long queue, or of a
replay, in memory. The engine still sees the next operation of every model, unless it is a large one. Messages
of the server itself that concern no model, such as cancellations, overtake everything else.
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
from collections import Counter, OrderedDict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from ...engine import messages, xla_flags
from ...engine.device_catalogue import GPU_SHARE
from ..errors import Unavailable
from ..events import Event
from ..ledger.payloads import PayloadLost

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
        """Set to 0 by whoever hears something."""

    def look(self) -> None:
        now = self._clock()
        self.seconds += min(now - self._looked_at, 2 * self._look_seconds)
        self._looked_at = now


_UNANSWERED_BYTES = 24 << 20  # of all lanes of a kind: training, or samples
_LANE_BYTES = 8 << 20
_SMALL_BYTES = 1 << 20  # a lane with nothing unanswered need not wait for the others to send that
_COPIED_BYTES = 64 << 10  # copying a smaller message is faster than sharing it with ZeroMQ
_TRY_AGAIN_SECONDS = 1.0


@dataclass(frozen=True)
class Lane:
    """A queue: the operations of a model, or, without a model, a tenant's samples."""

    model_id: str = ""
    owner: str = ""


@dataclass(frozen=True)
class Entry:
    """An operation that waits in a lane. `message` is None for a payload that is read when it is sent."""

    number: int
    request_id: str
    size: int
    message: bytes | None


class Outbox:
    """Sends messages to the engine when there is room for them. It outlives engines, and each finds it empty.

    `load` reads a payload, or returns None for one that is not needed any more. `on_lost` gets an operation
    whose payload cannot be read, its model, and why; what is behind it in its lane is dropped.
    """

    def __init__(
        self, load: Callable[[str], Awaitable[bytes | None]], on_lost: Callable[[str, str, str], None]
    ):
        self._load = load
        self._on_lost = on_lost
        self.life = 0  # how many engines there have been
        self.is_open = False  # there is an engine
        self.is_asleep = False  # `Sleep` was the last message to it
        self._empty()

    def _empty(self) -> None:
        self._own: deque[bytes] = deque()
        self._lanes: OrderedDict[Lane, deque[Entry]] = OrderedDict()
        self._waiting: set[str] = set()  # the ids of what is in the lanes, but for what was withdrawn
        self._unanswered: dict[str, tuple[Lane, int]] = {}
        self._lane_bytes: Counter[Lane] = Counter()
        self._bytes: Counter[bool] = Counter()  # of all models, and of all samples
        self._changed = asyncio.Event()
        self._moved = asyncio.Event()
        self._number = 0

    def open(self) -> None:
        """Take messages: there is a new engine."""
        self._empty()
        self.life += 1
        self.is_open = True

    def close(self) -> None:
        """Drop what waits: the engine has ended, and the next one gets what the ledger has."""
        self._empty()
        self.is_open = False

    def put_own(self, message: bytes) -> bool:
        """Add a message of the server that overtakes what waits. Return False without an engine."""
        self.is_asleep = False
        if self.is_open:
            self._own.append(message)
            self._changed.set()
        return self.is_open

    def requested(self, message: messages.ToEngine) -> None:
        """Note a request of the server's own. After `Sleep` the engine is asleep until the next message."""
        self.is_asleep = isinstance(message, messages.Sleep)

    def put(self, lane: Lane, request_id: str, size: int, message: bytes | None = None) -> bool:
        """Add an operation to its lane; `message` takes the place of its payload. Return False without an
        engine."""
        self.is_asleep = False
        if self.is_open:
            self._number += 1
            self._waiting.add(request_id)
            self._lanes.setdefault(lane, deque()).append(Entry(self._number, request_id, size, message))
            self._changed.set()
        return self.is_open

    def withdraw(self, request_id: str) -> bool:
        """Take back a message; return whether it was still waiting, and will not be sent."""
        was_waiting = request_id in self._waiting
        self._waiting.discard(request_id)
        return was_waiting

    def answered(self, request_id: str) -> None:
        """Note that a request was answered, which makes room for others."""
        lane, size = self._unanswered.pop(request_id, (None, 0))
        if lane is not None:
            self._bytes[bool(lane.model_id)] -= size
            self._lane_bytes[lane] -= size
            if not self._lane_bytes[lane]:
                del self._lane_bytes[lane]
            self._changed.set()

    async def until_sent(self) -> None:
        """Wait until everything that was put here so far has been sent."""
        number = self._number
        while any(queue[0].number <= number for queue in self._lanes.values()):
            self._moved.clear()
            await self._moved.wait()

    async def send_forever(self, socket: zmq.asyncio.Socket) -> None:
        """Hand messages to the engine's socket."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            while (message := self._own.popleft() if self._own else await self._take()) is not None:
                await socket.send(message, copy=len(message) < _COPIED_BYTES)

    async def _take(self) -> bytes | None:
        """Take the message that is sent next: the first one of the first lane for which there is room.

        None if there is no such lane, or nothing to send after all; then `_changed` tells when there may be.
        """
        for lane, queue in self._lanes.items():
            entry, total, mine = queue[0], self._bytes[bool(lane.model_id)], self._lane_bytes[lane]
            if mine and total + entry.size <= _UNANSWERED_BYTES and mine + entry.size <= _LANE_BYTES:
                break
            if not mine and (entry.size <= _SMALL_BYTES or total < _UNANSWERED_BYTES):
                break
        else:
            return None
        self._changed.set()  # there may be more
        message = entry.message
        if message is None and entry.request_id in self._waiting:
            try:
                message = await self._load(entry.request_id)
            except PayloadLost as error:
                log.error("operation %s cannot be sent: %s", entry.request_id, error)
                for each in self._lanes.pop(lane):
                    self._waiting.discard(each.request_id)
                self._moved.set()
                self._on_lost(entry.request_id, lane.model_id, error.message)
                return None
            except Exception as error:  # whatever it is, others must not wait for ever
                log.error("a payload cannot be read yet: %s", error)
                await asyncio.sleep(_TRY_AGAIN_SECONDS)
                return None
        queue.popleft()
        self._lanes.move_to_end(lane)
        if not queue:
            del self._lanes[lane]
        self._moved.set()
        is_wanted = entry.request_id in self._waiting  # it may have been withdrawn meanwhile
        self._waiting.discard(entry.request_id)
        if message is None or not is_wanted:
            return None
        if entry.request_id not in self._unanswered:
            size = max(entry.size, 1)
            self._unanswered[entry.request_id] = lane, size
            self._lane_bytes[lane] += size
            self._bytes[bool(lane.model_id)] += size
        return message


_LAST_ANSWERS_SECONDS = 0.05  # what it sent before its end may still be in the socket
# Before it is ready, an engine reads from disks that may be slow, and may hold Python's lock meanwhile.
_LOADING_MAY_TAKE = 5


class EngineProcess:
    """An engine's process, which gets the messages of `outbox` from its start to its end."""

    def __init__(
        self,
        config: messages.EngineConfig,
        outbox: Outbox,
        answered: Event[[messages.Done | messages.Failed, bytes]],
        drawn: Event[[messages.Drawn]],
        silence_seconds: float,
        module: str = "tinsmith.engine",
        inherited: tuple[int, ...] = (),
    ):
        """`answered`: for every answer that `request` is not waiting for, also as the engine encoded it.

        `drawn`: for tokens of samples before their answers.
        """
        self._config = config
        self._silence_seconds = silence_seconds
        self._silence = Silence(config.beat_seconds)
        self._module = module
        self._inherited = inherited
        self._answered = answered
        self._drawn = drawn
        self._outbox = outbox
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
        self._outbox.open()
        self._sending = asyncio.create_task(self._outbox.send_forever(self._socket))
        self._tasks = [
            self._sending,
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
            self._outbox.put(Lane(model_id), message.request_id, len(encoded), encoded)
        elif isinstance(message, messages.Sleep):
            await self._once_sent(message)
        else:
            self._outbox.put_own(encoded)
        return await answer

    async def _once_sent(self, message: messages.ToEngine) -> None:
        """Send a message that must not overtake what waits."""
        sent = asyncio.ensure_future(self._outbox.until_sent())
        ended = asyncio.ensure_future(self.ended.wait())
        await asyncio.wait((sent, ended), return_when=asyncio.FIRST_COMPLETED)
        sent.cancel()
        ended.cancel()
        if self.alive:
            self._outbox.put_own(messages.encode(message))
            self._outbox.requested(message)

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

    async def _receive_forever(self) -> None:
        while True:
            frame = await self._socket.recv()
            try:
                message = messages.decode_from_engine(frame)
            except (msgspec.DecodeError, msgspec.ValidationError):
                log.exception("the engine sent %d bytes that are not a message", len(frame))
                continue
            self._silence.seconds = 0.0
            match message:
                case messages.Done() | messages.Failed():
                    self.has_answered = True
                    if (answer := self._requests.pop(message.request_id, None)) is None:
                        for listener in self._answered:
                            listener(message, frame)
                    else:
                        self._outbox.answered(message.request_id)
                        if not answer.done():
                            answer.set_result(message)
                case messages.Drawn():
                    self.has_answered = True
                    self._drawn(message)
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
        self._sending.cancel()
        self._outbox.close()
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
