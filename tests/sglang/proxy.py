"""A way to a server that can be cut, as a server's death cuts it, without the seconds of another start."""

from __future__ import annotations

import asyncio
import contextlib


class Proxy:
    """A proxy on one port of this machine, also when it is opened again. `cut_at`: it is cut when it hears
    that, which the server does not."""

    def __init__(self, port: int):
        self._to = port
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0
        self.heard = bytearray()  # by the server
        self.cut_at: bytes | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    def kill(self) -> None:
        """Connections are reset, and no new ones taken."""
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._to)
        self._writers |= {writer, back}
        with contextlib.suppress(ConnectionError):
            await asyncio.gather(self._copy(reader, back, self.heard), self._copy(there, writer, None))
        self._writers -= {writer, back}

    async def _copy(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, heard: bytearray | None
    ) -> None:
        try:
            while data := await reader.read(1 << 16):
                if heard is not None:
                    if self.cut_at is not None and self.cut_at in data:
                        self.kill()
                        return
                    heard += data
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()
