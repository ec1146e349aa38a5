"""Prometheus' metrics of operations, which are counted as their answers are written."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client import Counter as PrometheusCounter

from ..access import Quotas

_SECONDS = (0.001, 0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800)


class OperationMetrics:
    """Counts operations by kind, outcome and class of tenant, and their waiting times, device times and
    tokens."""

    def __init__(self, registry: CollectorRegistry, quotas: Quotas):
        self.quotas = quotas
        self.operations = PrometheusCounter(
            "tinsmith_operations",
            "Operations that were answered",
            ["kind", "state", "tenant_class"],
            registry=registry,
        )
        self.wait = Histogram(
            "tinsmith_operation_wait_seconds",
            "Time from the acceptance of an operation to its answer that it was not on the device",
            ["kind"],
            registry=registry,
            buckets=_SECONDS,
        )
        self.device = Histogram(
            "tinsmith_operation_device_seconds",
            "Time that an operation held the device",
            ["kind"],
            registry=registry,
            buckets=_SECONDS,
        )
        self.tokens = PrometheusCounter(
            "tinsmith_tokens", "Tokens that answered operations used", ["kind"], registry=registry
        )
