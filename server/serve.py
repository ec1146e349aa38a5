"""Runs the application until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import socket
from types import FrameType

import uvicorn

from .app import create_app
from .base_models import BaseModel
from .settings import Settings

log = logging.getLogger("tinsmith.server")


class Server(uvicorn.Server):
    """Uvicorn that, on the first signal, drains the backend while it still answers polls."""

    def __init__(self, config: uvicorn.Config):
        super().__init__(config)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not noted as captured: uvicorn would raise it again at the end, and the exit code would not be 0.
        if self._draining is not None or self._loop is None:
            self.force_exit = True
            self.should_exit = True
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
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; with port 0 the system chooses one. Raises OSError if it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    listener.set_inheritable(True)
    return listener


def run(settings: Settings, base_models: list[BaseModel], listener: socket.socket) -> None:
    """Serves on `listener` until SIGINT or SIGTERM; returns after a clean stop."""
    config = uvicorn.Config(
        create_app(settings, base_models),
        log_config=None,
        access_log=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=5,
        backlog=4096,
        server_header=False,
    )
    Server(config).run(sockets=[listener])
