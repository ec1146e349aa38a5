"""The serving process: runs the application until it is told to stop."""

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

import uvicorn

from ...ckpt.tokenizer_files import without_torch
from ..app import create_app
from ..base_models import BaseModel
from ..http.gate import Connection
from ..ledger.ledger import Ledger
from ..settings import Settings


def allow_many() -> None:
    """Raise the limit of file descriptors as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


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
