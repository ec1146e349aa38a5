"""Runs the application until it is told to stop."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
from types import FrameType

import uvicorn

from .app import create_app
from .base_models import BaseModel
from .connections import Connection, allow_many
from .ledger.ledger import Ledger
from .settings import Settings

log = logging.getLogger("tinsmith.server")


class Server(uvicorn.Server):
    """Uvicorn that, on the first signal, drains the backend while it still answers polls."""

    def __init__(self, config: uvicorn.Config):
        super().__init__(config)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task | None = None
        self.failed = False  # to start, or to stop in order

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        watches = [asyncio.ensure_future(each) for each in (self._watch_start(), self._watch_lease())]
        await super().serve(sockets)
        for watch in watches:
            watch.cancel()

    async def _watch_start(self) -> None:
        """An engine that refuses to start at all would do so the next time too."""
        while not self.started:
            await asyncio.sleep(0.05)
        await self.config.app.state.backend.engine.refused.wait()  # type: ignore[union-attr]
        if self._draining is None:
            log.error("the engine could not start; its messages above say why")
            self.failed = self.should_exit = True

    async def _watch_lease(self) -> None:
        """A server that another one has replaced ends at once: what it has in memory may be wrong by now."""
        while not self.started:
            await asyncio.sleep(0.05)
        backend = self.config.app.state.backend  # type: ignore[union-attr]
        await asyncio.shield(asyncio.wrap_future(backend.ledger.lost))
        log.error("stopping at once, with the engine: this server does not own its ledger any more")
        backend.engine.kill()
        logging.shutdown()
        os._exit(1)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not noted as captured: uvicorn would raise it again at the end, and the exit code would not be 0.
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
            await self.config.app.state.backend.drain()  # type: ignore[union-attr]
        except Exception:
            log.exception("the models could not all be saved")
            self.failed = True
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; with port 0 the system chooses one. Raises OSError if it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    listener.set_inheritable(True)
    return listener


def run(settings: Settings, base_models: list[BaseModel], listener: socket.socket, ledger: Ledger) -> bool:
    """Serves on `listener` until SIGINT or SIGTERM; whether it started, and stopped with all saved."""
    config = uvicorn.Config(
        create_app(settings, base_models, ledger),
        http=Connection,
        log_config=None,
        access_log=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=5,
        backlog=4096,
        server_header=False,
    )
    allow_many()
    _collect_seldom()
    server = Server(config)
    server.run(sockets=[listener])
    return server.started and not server.failed


def _collect_seldom() -> None:
    """What was made at the start stays, and is not looked through again: with thousands of open polls a full
    collection took 0.4 s, in which nobody was answered. Requests make next to no cycles."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(2_000, 10, 1_000)
