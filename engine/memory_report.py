"""Reports to the server about the memory of the devices, sent when it has changed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from . import messages
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
        self._programs = list(programs)
        self._sent: messages.Memory | None = None
        self._sent_at = -_SECONDS

    def send(self, at_once: bool, asleep: bool) -> None:
        """Send a report if it differs from the last one; only now and then, unless `at_once`."""
        now = time.monotonic()
        if not at_once and now < self._sent_at + _SECONDS:
            return
        report = self.report(asleep)
        if report != self._sent:
            self._send(report)
        self._sent, self._sent_at = report, now

    def report(self, asleep: bool) -> messages.Memory:
        plan = self._engine_memory.plan
        largest = max(each.largest_bytes for each in self._programs)
        held = {"base": plan.base, "programs": largest, "kv_pages": plan.kv_pages}
        held |= self._engine_memory.budget.by_kind()
        held = dict.fromkeys(held, 0) if asleep else held
        return messages.Memory(plan.capacity, plan.kinds, held, free_bytes(), self._tenants.bytes_waiting)
