"""Folders below the data directory as SGLang servers see them, and their names there."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from ....ckpt import paths
from .endpoint import CannotServe

WAIT_SECONDS = 60.0
"""For a folder whose save was answered before it was written. An engine that died with it makes it again when
its own sampler is asked."""
_LOOK_SECONDS = 0.01
EXPORTS = "exports"  # of full weights that are made for servers


class Folders:
    """`seen_as` is where the servers have `data_dir` mounted."""

    def __init__(self, data_dir: Path, seen_as: Path | None):
        self.data_dir = data_dir.resolve()
        self._seen_as = seen_as or self.data_dir

    def here(self, key: str) -> Path:
        return paths.resolve(self.data_dir, key)

    def there(self, key: str) -> str:
        """The path that a server is told."""
        return str(self._seen_as / paths.check_key(key))

    def key_of(self, path_there: str) -> str | None:
        """The key of a path that a server says; None for one that is not below our data directory."""
        try:
            return paths.check_key(Path(path_there).relative_to(self._seen_as).as_posix())
        except ValueError:
            return None

    async def whole(self, key: str) -> Path:
        """The folder, once it is there: folders appear whole. Raises CannotServe for one that does not."""
        folder, deadline = self.here(key), time.monotonic() + WAIT_SECONDS
        while not await asyncio.to_thread(folder.is_dir):
            if time.monotonic() > deadline:
                raise CannotServe("these weights are not on disk")
            await asyncio.sleep(_LOOK_SECONDS)
        return folder


def server_name(key: str) -> str:
    """What servers call the weights of a directory key: their model and version, and no others."""
    return ".".join(part for part in key.split("/") if part not in ("checkpoints", "samplers"))
