"""The serving process: runs the application until it is told to stop, and bounds slow connections.

A client that sends half a request, or does not read its answer, holds a descriptor and memory. So the head of
a request has `stall_seconds` from its first byte (or the connection's beginning), and a body or an answer
must move within every `stall_seconds`. Between two requests uvicorn's `timeout_keep_alive` applies;
operations may take as long as they need.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import resource
import socket
import sys
from types import FrameType
from typing import Any

import uvicorn
from uvicorn._types import HTTPScope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ...ckpt.tokenizer_files import without_torch
from ..app import create_app
from ..base_models import BaseModel
from ..http.gate import MAX_HEADERS
from ..ledger.ledger import Ledger
from ..settings import Settings

MAX_HEAD_BYTES = 256 << 10
_HEAD_TOO_LONG = b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\n\r\n"


def allow_many() -> None:
    """Raise the limit of file descriptors as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Connection(HttpToolsProtocol):
    """One connection of uvicorn, with limits for slow clients."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._stall_seconds: float = self.config.app.state.services[Settings].stall_seconds  # type: ignore[union-attr]
        self._request: asyncio.TimerHandle | None = None  # runs while a request is incomplete
        self._answer: asyncio.TimerHandle | None = None  # runs while an answer is not read
        self._received: HTTPScope | None = None  # the last request that has arrived as a whole
        self._has_moved = False
        self._unread = 0
        self._head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._request, self._answer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    # --- requests

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._has_moved = True
        if self.scope is self._received:  # no other request has begun
            return
        if self._request is None:
            self._await_request()
        if not self._is_in_body():
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
                self.transport.write(_HEAD_TOO_LONG)
                self.transport.close()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._received, self._head_bytes = self.scope, 0
        if self._request is not None:
            self._request.cancel()
            self._request = None

    def _is_in_body(self) -> bool:
        """Return whether the head of the request that arrives is complete."""
        return self.cycle is not None and self.cycle.scope is self.scope

    def _await_request(self) -> None:
        self._request = self.loop.call_later(self._stall_seconds, self._look_at_request)

    def _look_at_request(self) -> None:
        # Nothing moves either while the application has not read what was received.
        if self._is_in_body() and (self._has_moved or self.flow.read_paused):
            self._has_moved = False
            self._await_request()
        else:
            self.transport.abort()

    # --- answers

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._answer is not None:
            self._answer.cancel()
            self._answer = None

    def _await_reader(self) -> None:
        self._unread = self.transport.get_write_buffer_size()
        self._answer = self.loop.call_later(self._stall_seconds, self._look_at_answer)

    def _look_at_answer(self) -> None:
        if self.transport.get_write_buffer_size() < self._unread:
            self._await_reader()
        else:
            self.transport.abort()


log = logging.getLogger("tinsmith.server")
BACKLOG = 4096  # connections that wait to be accepted

_SWITCH_SECONDS = 0.001
"""The longest time for which a busy thread keeps the interpreter's lock from the event loop.

Python's default of 5 ms adds up, several times per request.
"""


class Server(uvicorn.Server):
    """Uvicorn that, on the first signal, drains the application while it still answers polls."""

    def __init__(self, config: uvicorn.Config):
        super().__init__(config)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task | None = None
        self._watches: list[asyncio.Task[None]] = []
        self.failed = False  # to start, or to stop in order

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._watches = [asyncio.ensure_future(each) for each in (self._watch_start(), self._watch_lease())]
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for watch in self._watches:
            watch.cancel()
        await super().shutdown(sockets)

    async def _watch_start(self) -> None:
        """Stop if the engine cannot start at all, because it could not the next time either."""
        while not self.started:
            await asyncio.sleep(0.05)
        await self.config.app.state.application.engine.refused.wait()  # type: ignore[union-attr]
        if self._draining is None:
            log.error("the engine could not start; its messages above say why")
            self.failed = self.should_exit = True

    async def _watch_lease(self) -> None:
        """Stop at once if another server has replaced this one: its memory may be outdated."""
        while not self.started:
            await asyncio.sleep(0.05)
        application = self.config.app.state.application  # type: ignore[union-attr]
        await asyncio.shield(asyncio.wrap_future(application.ledger.lost))
        log.error("stopping at once, with the engine: this server does not own its ledger any more")
        application.engine.kill()
        logging.shutdown()
        os._exit(1)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not recorded as captured: uvicorn would raise it again at the end, and the exit code would not be 0.
        if self._draining is not None or self._loop is None:
            self.failed = self.force_exit = self.should_exit = True
            return
        self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        if self._draining is None:
            log.info("stopping: finishing running work (once more to stop at once)")
            self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        try:
            await self.config.app.state.application.drain()  # type: ignore[union-attr]
        except Exception:
            log.exception("the models could not all be saved")
            self.failed = True
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; with port 0 the system chooses the port. Raises ValueError saying why it
    cannot.

    It listens before requests can be answered, because two sockets can be bound to a port until one of them
    listens.
    """
    if not host:
        raise ValueError("--host: it is empty; 127.0.0.1 is this machine, 0.0.0.0 all its addresses")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--host: {host!r} is neither an address nor a known name ({error})") from None
    found.sort(key=lambda each: each[0] != socket.AF_INET)  # prefers 127.0.0.1 for localhost
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ValueError(_why_not_bound(host, port, error)) from None
    listener.set_inheritable(True)
    return listener


def _why_not_bound(host: str, port: int, error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return f"--port: {port} is in use on {host}; stop the program that has it, or choose another port"
        case errno.EACCES:
            return f"--port: this user may not bind port {port}; choose one from 1024 on"
        case errno.EADDRNOTAVAIL:
            return f"--host: {host} is not an address of this machine; 0.0.0.0 is all of them"
    return f"--host, --port: {host}, port {port}, cannot be bound ({error.strerror})"


def run(settings: Settings, base_models: list[BaseModel], listener: socket.socket, ledger: Ledger) -> bool:
    """Serve on `listener` until SIGINT or SIGTERM; return whether it started, and saved everything at the
    end."""
    without_torch()
    config = uvicorn.Config(
        create_app(settings, base_models, ledger),
        http=Connection,
        log_config=None,
        access_log=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=5,
        backlog=BACKLOG,
        server_header=False,
    )
    allow_many()
    _collect_seldom()
    sys.setswitchinterval(_SWITCH_SECONDS)
    server = Server(config)
    server.run(sockets=[listener])
    return server.started and not server.failed


def _collect_seldom() -> None:
    """Exclude the objects of the start from garbage collection, and collect less often.

    With thousands of open polls a full collection took 0.4 s, in which nobody was answered. Requests make
    almost no cycles.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(2_000, 10, 1_000)
