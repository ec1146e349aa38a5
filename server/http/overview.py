"""The server as one tenant may see it, now and as it changes."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import orjson

from ... import __version__
from ...engine import messages
from ..checkpoints.sweep import Sweep
from ..disk import Disk
from ..errors import TooManyRequests
from ..models.runs import Runs
from ..operations.operations import Operations
from ..operations.step_metrics import Activity
from ..supervision.supervisor import Supervisor

_LOOK_SECONDS = 1.0
_QUIET_LOOKS = 15  # after so many without news a comment shows that the connection lives
_MOST_STREAMS = 16  # of an owner
_DISK_STEP = 24  # free space is told in steps of 16 MiB, so that an idle server has no news


class Overview:
    def __init__(
        self, engine: Supervisor, operations: Operations, runs: Runs, disk: Disk, sweep: Sweep
    ) -> None:
        self._engine, self._operations, self._runs = engine, operations, runs
        self._disk, self._sweep = disk, sweep
        self._streams: Counter[str] = Counter()  # open ones, by owner
        self.activity = Activity()

    def require_stream(self, owner: str) -> None:
        """Raises TooManyRequests."""
        if self._streams[owner] >= _MOST_STREAMS:
            raise TooManyRequests(f"{_MOST_STREAMS} consoles of yours are open; close one of them")

    async def events(self, owner: str, looks: int | None = None) -> AsyncIterator[bytes]:
        """Server-sent events: what `of` returns, at once and when it has changed. They end after `looks`,
        one a second, or with the server."""
        self._streams[owner] += 1
        try:
            sent, quiet = b"", 0
            for look in itertools.count(1):
                event = orjson.dumps(self.of(owner))
                if event != sent:
                    yield b"event: overview\ndata: " + event + b"\n\n"
                    sent, quiet = event, 0
                elif (quiet := quiet + 1) % _QUIET_LOOKS == 0:
                    yield b": nothing new\n\n"
                if look == looks or self._operations.stopped:
                    return
                await asyncio.sleep(_LOOK_SECONDS)
        finally:
            self._streams[owner] -= 1

    def of(self, owner: str) -> dict[str, Any]:
        """Return the engine, the queue of the owner's operations, and the disk, as they are now."""
        engine, unanswered = self._engine, self._operations.unanswered()
        counters = engine.counters
        waiting = Counter(operation.model_id for operation in unanswered if operation.owner == owner)
        samples = waiting.pop("", 0)
        names = {run.id: run.name for run in self._runs.resident() if run.owner == owner}
        return {
            "owner": owner,
            "version": __version__,
            "engine": {
                "phase": "asleep" if engine.is_asleep else engine.phase,
                "text": engine.text,
                "ready": engine.ready.is_set(),
                "lives": engine.life,
            },
            "memory": None if engine.memory is None else _memory(engine.memory),
            "compilations": {
                "count": int(counters.get("compilations/compiled", 0)),
                "from_cache": int(counters.get("compilations/cache", 0)),
                "seconds": round(counters.get("compilation_seconds", 0.0), 1),
            },
            "queue": {
                "all_tenants": len(unanswered),
                "models": [
                    {"id": run_id, "name": names.get(run_id, run_id), "waiting": count}
                    for run_id, count in sorted(waiting.items())
                ],
                "samples": samples,
            },
            "resident_models": sorted(names),
            "disk": self._disk_usage(),
            "revisions": self.activity.of(owner),
        }

    def _disk_usage(self) -> dict[str, int] | None:
        try:
            total, free = self._disk.usage()
        except OSError:
            return None
        told = free >> _DISK_STEP << _DISK_STEP
        return {"total_bytes": total, "free_bytes": told, **self._sweep.used_bytes}


def _memory(memory: messages.Memory) -> dict[str, Any]:
    return {"capacity_bytes": memory.capacity, "held_bytes": memory.held, "free_bytes": memory.free}
