"""Reports to the server about the memory of the devices, sent when it has changed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import jax

from . import host_memory, messages
from .base_models import EngineMemory
from .device_memory import free_bytes
from .programs import Programs
from .tenants import Tenants

_SECONDS = 2.0  # between two reports while the engine works


class MemoryReport:
    """Sends the reports (`messages.Memory`)."""

    def __init__(
        self,
        memory: EngineMemory,
        tenants: Tenants,
        programs: Iterable[Programs],
        send: Callable[[messages.Memory], None],
    ):
        self._engine_memory, self._tenants, self._send = memory, tenants, send
        self._on_cpu = jax.local_devices()[0].platform == "cpu"
        self._free_here, self._read_at = host_memory.free_bytes(), -_SECONDS
        self._programs = list(programs)
        self._sent: messages.Memory | None = None
        self._sent_at = -_SECONDS

    def send(self, at_once: bool, asleep: bool, parked_bytes: int) -> None:
        """Send a report if it differs from the last one; only now and then, unless `at_once`.

        `parked_bytes`: of states that a sleeping engine has in the host's memory."""
        now = time.monotonic()
        if not at_once and now < self._sent_at + _SECONDS:
            return
        report = self._report(asleep, parked_bytes, now)
        if report != self._sent:
            self._send(report)
        self._sent, self._sent_at = report, now

    def _report(self, asleep: bool, parked_bytes: int, now: float) -> messages.Memory:
        plan = self._engine_memory.plan
        largest = max(each.largest_bytes for each in self._programs)
        held = {"base": plan.base, "programs": largest, "kv_pages": plan.kv_pages}
        held |= self._engine_memory.budget.by_kind()
        held = dict.fromkeys(held, 0) if asleep else held
        waiting = self._tenants.bytes_waiting + parked_bytes
        return messages.Memory(plan.capacity, plan.kinds, held, self._free(now), waiting)

    def _free(self, now: float) -> int | None:
        """Return the first device's free bytes; for a CPU the machine's, which are read now and then."""
        if not self._on_cpu:
            return free_bytes()
        if now >= self._read_at + _SECONDS:
            self._free_here, self._read_at = host_memory.free_bytes(), now
        return self._free_here
