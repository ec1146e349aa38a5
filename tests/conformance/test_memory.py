"""`/health` and `/metrics` say how the devices' memory is planned, and what takes it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest
from conformance.server_process import ServerProcess, Wire


def gauges(wire: Wire, name: str) -> dict[str, float]:
    """The values of a gauge by kind."""
    text = wire.http.get("/metrics").text
    return {kind: float(value) for kind, value in re.findall(rf'^{name}{{kind="(\w+)"}} (\S+)$', text, re.M)}


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_health_and_metrics_tell_the_plan_and_what_is_held(server: ServerProcess, wire: Wire) -> None:
    memory = server.health()["memory"]
    planned, held = memory["planned_bytes"], memory["held_bytes"]
    assert {"base", "programs", "kv_pages", "budget"} <= set(planned)
    assert sum(planned.values()) <= memory["capacity_bytes"]
    assert planned["base"] == held["base"]
    assert memory["waiting_in_host_memory_bytes"] == 0
    model = wire.model(rank=8)
    until(lambda: server.health()["memory"]["held_bytes"]["tenants"] > held["tenants"])
    wire.result(wire.forward_backward(model, 1))
    until(lambda: server.health()["memory"]["held_bytes"]["programs"] > 0)
    scraped = gauges(wire, "tinsmith_device_memory_held_bytes")
    assert scraped == pytest.approx(server.health()["memory"]["held_bytes"])
    assert gauges(wire, "tinsmith_device_memory_planned_bytes") == pytest.approx(planned)
