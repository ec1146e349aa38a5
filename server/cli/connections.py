"""Connections that end when their other end does nothing.

Whoever connects and sends half a request, or does not read its answer, holds a descriptor and some memory,
and would for ever. The head of a request has `stall_seconds` from its first byte (or the connection's
beginning) on; a body, or an answer, has as long as some of it moves every `stall_seconds`. Between two
requests uvicorn waits for its `timeout_keep_alive`; an operation is waited for as long as it takes.
"""

from __future__ import annotations

import asyncio
import resource
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ..settings import Settings

MAX_HEAD_BYTES = 256 << 10
MAX_HEADERS = 256
_HEAD_TOO_LONG = b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\n\r\n"


def allow_many() -> None:
    """As many descriptors as the system gives this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Connection(HttpToolsProtocol):
    """What uvicorn makes for each connection."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._stall_seconds: float = self.config.app.state.services[Settings].stall_seconds  # type: ignore[union-attr]
        self._request: asyncio.TimerHandle | None = None  # runs while one is incomplete
        self._answer: asyncio.TimerHandle | None = None  # runs while one is not read
        self._in_body = False
        self._has_moved = False
        self._unread = 0
        self._head_bytes = 0

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._in_body:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.transport.write(_HEAD_TOO_LONG)
                self.transport.close()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    # --- requests

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_body = False
        self._head_bytes = 0
        if self._request is None:
            self._await_request()

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self.headers) >= MAX_HEADERS:
            raise ValueError("too many headers")  # uvicorn answers 400
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._in_body = self._has_moved = True

    def on_body(self, body: bytes) -> None:
        self._has_moved = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._request is not None:
            self._request.cancel()
            self._request = None
        super().on_message_complete()

    def _await_request(self) -> None:
        self._request = self.loop.call_later(self._stall_seconds, self._look_at_request)

    def _look_at_request(self) -> None:
        # Nothing moves either while the application has not taken what is there.
        if self._in_body and (self._has_moved or self.flow.read_paused):
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

    def _stop_waiting(self) -> None:
        for timer in (self._request, self._answer):
            if timer is not None:
                timer.cancel()
