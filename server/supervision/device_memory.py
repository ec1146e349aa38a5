"""The engine's report about the devices' memory, as gauges."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, Metric

from .supervisor import Supervisor


class DeviceMemory:
    """Collects, for Prometheus, bytes of each device by kind: planned and held."""

    def __init__(self, engine: Supervisor):
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """Yield nothing before the engine has reported."""
        memory = self._engine.memory
        if memory is None:
            return
        for name, text, kinds in (
            ("planned", "Memory of each device that is planned for a kind", memory.planned),
            ("held", "Memory of each device that a kind takes", memory.held),
        ):
            gauge = GaugeMetricFamily(f"tinsmith_device_memory_{name}_bytes", text, labels=["kind"])
            for kind, size in kinds.items():
                gauge.add_metric([kind], size)
            yield gauge
        text = "Memory of each device that the engine may use"
        yield GaugeMetricFamily("tinsmith_device_memory_capacity_bytes", text, memory.capacity)
        if memory.free is not None:
            text = "Memory of the first device that is free"
            yield GaugeMetricFamily("tinsmith_device_memory_free_bytes", text, memory.free)
        text = "States of models in training that wait in the host's memory"
        yield GaugeMetricFamily("tinsmith_host_memory_waiting_bytes", text, memory.waiting)
