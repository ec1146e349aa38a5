"""Monitoring: metrics for Prometheus, and the console's overview.

`docs/metrics.md` lists the metrics. The engine reports its own counters about once a second, and they
continue over its lives.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily as Total
from prometheus_client.core import GaugeMetricFamily as Gauge
from prometheus_client.core import Metric

from ... import __version__
from ...engine import messages
from ..checkpoints.sweep import Sweep
from ..errors import TooManyRequests
from ..files import Disk
from ..ledger.ledger import Ledger
from ..models.recovery import Recovery
from ..models.runs import Runs
from ..operations.operations import Operations
from ..supervision.supervisor import Supervisor

_SECONDS = (0.001, 0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800)


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.request_seconds = Histogram(
            "tinsmith_request_seconds", "Duration of requests", ["route", "status"], registry=self.registry
        )


@dataclass(eq=False)
class ServerMetrics:
    """Collects the state of the server's objects whenever Prometheus asks for the metrics."""

    engine: Supervisor
    operations: Operations
    runs: Runs
    recovery: Recovery
    ledger: Ledger
    disk: Disk
    sweep: Sweep
    _kinds: set[str] = field(default_factory=lambda: {"forward_backward", "optim_step", "sample"}, init=False)
    """Kinds of operations that have waited, which are shown at 0 from then on."""

    def describe(self) -> Iterable[Metric]:
        """Return nothing: a registry would otherwise collect when it registers this, before there is a
        server."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics but those that `Metrics` and `OperationMetrics` count."""
        counted = Counter(operation.kind for operation in self.operations.unanswered())
        self._kinds |= counted.keys()
        waiting = {kind: counted[kind] for kind in sorted(self._kinds)}
        yield _gauges("tinsmith_operations_waiting", "Operations without an answer yet", "kind", waiting)
        resident = len(self.runs.resident())
        yield Gauge("tinsmith_models_resident", "Models whose training state the engine has", resident)
        yield from self._of_engine()
        if self.engine.memory is not None:
            yield from _of_memory(self.engine.memory)
        ledger, text = self.ledger, "Time that the oldest change of the newest commit waited"
        yield Gauge("tinsmith_ledger_lag_seconds", text, ledger.lag_seconds)
        yield Total("tinsmith_ledger_commits", "Commits", ledger.commits)
        yield Total("tinsmith_ledger_commit_seconds", "Time spent in commits", ledger.commit_seconds)
        yield from self._of_disk()

    def _of_engine(self) -> Iterator[Metric]:
        engine, counters = self.engine, self.engine.counters
        yield Gauge("tinsmith_engine_ready", "1 if the engine is ready", engine.ready.is_set())
        yield Total("tinsmith_engine_lives", "Engine processes since the start", engine.life)
        replayed = self.recovery.replayed
        yield Total("tinsmith_replayed_operations", "Operations sent to an engine again", replayed)
        text = "Time spent on compiling and reading programs"
        yield Total("tinsmith_compilation_seconds", text, counters.get("compilation_seconds", 0.0))
        for family, text, label, always in (
            ("compilations", "Programs compiled, or read from the cache", "source", ("compiled", "cache")),
            ("training_positions", "Positions of micro-batches computed", "kind", ("token", "padding")),
            ("decode_slots", "Slots of the decode batches that were computed", "state", ("used", "empty")),
        ):
            total = Total(f"tinsmith_{family}", text, labels=[label])
            for value, count in _by_label(counters, family, always).items():
                total.add_metric([value], count)
            yield total
        pages = _by_label(engine.gauges, "kv_pages", ("used", "free"))
        yield _gauges("tinsmith_kv_pages", "Pages of keys and values", "state", pages)

    def _of_disk(self) -> Iterator[Metric]:
        used = self.sweep.used_bytes | {"ledger": self.sweep.ledger_bytes()}
        yield _gauges("tinsmith_disk_used_bytes", "Bytes in the data directory, by kind", "kind", used)
        try:
            total, free = self.disk.usage()
        except OSError:
            return
        yield Gauge("tinsmith_disk_free_bytes", "Free bytes on the data directory's disk", free)
        yield Gauge("tinsmith_disk_size_bytes", "Size of the data directory's disk", total)


def _of_memory(memory: messages.Memory) -> Iterator[Metric]:
    """Yield the bytes of each device, by kind and as a whole."""
    text = "Memory of each device that is planned for a kind"
    yield _gauges("tinsmith_device_memory_planned_bytes", text, "kind", memory.planned)
    text = "Memory of each device that a kind takes"
    yield _gauges("tinsmith_device_memory_held_bytes", text, "kind", memory.held)
    text = "Memory of each device that the engine may use"
    yield Gauge("tinsmith_device_memory_capacity_bytes", text, memory.capacity)
    if memory.free is not None:
        text = "Free memory of the first device; on a CPU, of the machine"
        yield Gauge("tinsmith_device_memory_free_bytes", text, memory.free)
    text = "States of models in training that wait in the host's memory"
    yield Gauge("tinsmith_host_memory_waiting_bytes", text, memory.waiting)


def _by_label(values: dict[str, float], family: str, always: Iterable[str]) -> dict[str, float]:
    """Return the values named `family/LABEL` by label, with 0 for labels that are always shown."""
    prefix = f"{family}/"
    found = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
    return dict.fromkeys(always, 0.0) | found


def _gauges(name: str, text: str, label: str, values: Mapping[str, float]) -> Gauge:
    """Return a gauge with one value for each value of the label."""
    gauge = Gauge(name, text, labels=[label])
    for value, number in values.items():
        gauge.add_metric([value], number)
    return gauge


_LOOK_SECONDS = 1.0
_QUIET_LOOKS = 15  # after so many without news a comment shows that the connection lives
_MOST_STREAMS = 16  # of an owner
_DISK_STEP = 24  # free space is shown in steps of 16 MiB, so that an idle server has no news


_ACTIVE_MODELS = 256  # of an owner


@dataclass(eq=False)
class Overview:
    """The server as one tenant may see it, now and as it changes."""

    engine: Supervisor
    operations: Operations
    runs: Runs
    disk: Disk
    sweep: Sweep
    _reports: dict[str, OrderedDict[str, int]] = field(default_factory=dict, init=False)
    """How often metrics of a model came from its client, by owner and model, the newest last."""
    _streams: Counter[str] = field(default_factory=Counter, init=False)  # open ones, by owner

    def require_stream(self, owner: str) -> None:
        """Raise TooManyRequests if the owner has too many streams open."""
        if self._streams[owner] >= _MOST_STREAMS:
            raise TooManyRequests(f"{_MOST_STREAMS} consoles of yours are open; close one of them")

    async def events(self, owner: str, looks: int | None = None) -> AsyncIterator[bytes]:
        """Yield server-sent events with what `of` returns: at once, and whenever it has changed. The stream
        ends after `looks`, one a second, or with the server."""
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
                if look == looks or self.operations.stopped:
                    return
                await asyncio.sleep(_LOOK_SECONDS)
        finally:
            self._streams[owner] -= 1

    def reported(self, owner: str, model_id: str) -> None:
        """Note that metrics of the model came from its client."""
        counts = self._reports.setdefault(owner, OrderedDict())
        counts[model_id] = counts.get(model_id, 0) + 1
        counts.move_to_end(model_id)
        if len(counts) > _ACTIVE_MODELS:
            counts.popitem(last=False)

    def _revisions(self, owner: str) -> dict[str, int]:
        """Return a number for each active model, which changes with its answers and its client's reports."""
        found = Counter(self.operations.newest_answered(owner, _ACTIVE_MODELS))
        return dict(found + Counter(self._reports.get(owner)))

    def of(self, owner: str) -> dict[str, Any]:
        """Return the engine, the queue of the owner's operations, and the disk, as they are now."""
        engine, unanswered = self.engine, self.operations.unanswered()
        counters = engine.counters
        waiting = Counter(operation.model_id for operation in unanswered if operation.owner == owner)
        samples = waiting.pop("", 0)
        names = {run.id: run.name for run in self.runs.resident() if run.owner == owner}
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
            "revisions": self._revisions(owner),
        }

    def _disk_usage(self) -> dict[str, int] | None:
        try:
            total, free = self.disk.usage()
        except OSError:
            return None
        rounded = free >> _DISK_STEP << _DISK_STEP
        return {"total_bytes": total, "free_bytes": rounded, **self.sweep.used_bytes}


def _memory(memory: messages.Memory) -> dict[str, Any]:
    return {"capacity_bytes": memory.capacity, "held_bytes": memory.held, "free_bytes": memory.free}
