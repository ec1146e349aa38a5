"""The engine's end of the socket to the server, in a thread of its own.

Messages are received while the device computes, and answers leave while the loop already does the next work.
The thread never polls: it waits on the socket, on a wake-up descriptor, and on the life of the server's
process. In between it sends the beats by which the server knows that this process lives. They continue while
the device computes and XLA compiles, and stop when the process is stopped or a thread keeps Python's lock.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket as os_socket
import threading
import time
from typing import Any

import msgspec
import zmq

from . import messages

log = logging.getLogger(__name__)

PARENT_CHECK_SECONDS = 1.0
"""The seconds between two looks for the parent, if the system cannot wait for a process by descriptor."""


class Socket:
    """The socket and its thread. `inbox` has the server's messages, in order, and whatever else `post` puts
    there."""

    def __init__(self, address: str, beat_seconds: float):
        self._beat_seconds = beat_seconds
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._wake_reader, self._wake_writer = os_socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._context = zmq.Context()
        self._dealer = self._context.socket(zmq.DEALER)
        self._dealer.set_hwm(
            0
        )  # no limit: nothing is dropped or blocks, because the server bounds what it sends
        self._dealer.connect(address)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="socket", daemon=True)
        self._thread.start()

    def send(self, message: messages.FromEngine) -> None:
        """Queue a message for the server and return at once. Safe to call from any thread."""
        self._outbox.put(messages.encode(message))
        self._wake()

    def post(self, event: Any) -> None:
        """Put an event of our own among the received messages. Safe to call from any thread."""
        self.inbox.put(event)

    def close(self, patience_seconds: float = 10.0) -> None:
        """Send what is queued, as far as the server reads it in time, and end the thread."""
        self._closing.set()
        self._wake()
        self._thread.join()
        self._dealer.close(linger=int(1000 * patience_seconds))
        self._context.term()

    def _wake(self) -> None:
        with contextlib.suppress(
            BlockingIOError
        ):  # the pipe is full of unread wake-ups, so one more is not needed
            self._wake_writer.send(b"\0")

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._dealer, zmq.POLLIN)
        poller.register(self._wake_reader, zmq.POLLIN)
        parent = os.getppid()
        parent_descriptor = _process_descriptor(parent)
        if parent_descriptor is not None:
            poller.register(parent_descriptor, zmq.POLLIN)
        longest_wait = self._beat_seconds if parent_descriptor is not None else PARENT_CHECK_SECONDS
        beat = messages.encode(messages.Beat())
        beat_due = time.monotonic()
        while True:
            until_beat = max(beat_due - time.monotonic(), 0.0)
            # Rounded up, because waits that end before the beat is due would repeat many times.
            ready = dict(poller.poll(int(1000 * min(until_beat, longest_wait)) + 1))
            if parent_descriptor in ready or os.getppid() != parent:
                # The server has ended, and a new one may need the accelerator now. What is being
                # written stays under a temporary name.
                log.error("the server has ended; the engine ends too")
                os._exit(1)
            if self._dealer in ready:
                self._receive()
            if self._wake_reader.fileno() in ready:
                self._drain_wake_ups()
            closing = self._closing.is_set()
            self._send_queued()
            if time.monotonic() >= beat_due:
                self._dealer.send(beat)
                beat_due = time.monotonic() + self._beat_seconds
            if closing:
                return

    def _receive(self) -> None:
        while True:
            try:
                frame = self._dealer.recv_multipart(zmq.NOBLOCK)[-1]
            except zmq.Again:
                return
            try:
                self.inbox.put(messages.decode_to_engine(frame))
            except msgspec.MsgspecError:
                log.exception("the server sent %d bytes that are not a message", len(frame))

    def _send_queued(self) -> None:
        while True:
            try:
                self._dealer.send(self._outbox.get_nowait(), copy=False)
            except queue.Empty:
                return

    def _drain_wake_ups(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._wake_reader.recv(4096):
                pass


def _process_descriptor(pid: int) -> int | None:
    """Return a descriptor that becomes readable when the process ends (Linux), or None."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None
