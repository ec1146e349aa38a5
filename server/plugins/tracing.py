"""Traces of operations for OpenTelemetry: one span from an operation's acceptance to its answer.

The exporter is optional (the extra `otel`). A thread of the library sends spans in batches with
OTLP over HTTP; while the collector does not keep up or cannot be reached, spans are lost and nothing else
happens.
"""

from __future__ import annotations

import asyncio
import time

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from ... import __version__
from ...engine import messages
from ..operations.operation import Operation

_PROPAGATOR = TraceContextTextMapPropagator()
_LAST_SECONDS = 5.0  # for the spans that are left when the server stops


class OperationSpans:
    """Sends the spans of answered operations to the collector at `endpoint`, a URL such as
    `http://collector:4318`."""

    def __init__(self, endpoint: str):
        resource = Resource.create({"service.name": "tinsmith", "service.version": __version__})
        exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=_LAST_SECONDS)
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("tinsmith")

    def answered(self, operation: Operation) -> None:
        """Send the span of an answered operation, with child spans for its wait and its computation."""
        answer, end = operation.answer, time.time_ns()
        if answer is None:
            return
        start = end - int((time.monotonic() - operation.accepted_at) * 1e9)
        on_device = max(start, end - int(answer.device_seconds * 1e9))
        parent = _PROPAGATOR.extract({"traceparent": operation.trace_parent})
        span = self._tracer.start_span(
            operation.kind,
            parent,
            trace.SpanKind.SERVER,
            {
                "tinsmith.request_id": operation.request_id,
                "tinsmith.tenant": operation.owner,
                "tinsmith.model_id": operation.model_id,
                "tinsmith.seq_id": operation.seq_id,
                "tinsmith.payload_bytes": operation.payload_bytes,
                **{f"tinsmith.tokens.{kind}": count for kind, count in operation.used.items()},
            },
            start_time=start,
        )
        if isinstance(answer, messages.Failed):
            span.set_status(trace.StatusCode.ERROR, f"{answer.category}: {answer.message[:500]}")
        below = trace.set_span_in_context(span)
        for name, began, ended in (("waiting", start, on_device), ("on the device", on_device, end)):
            if ended > began:
                self._tracer.start_span(name, below, start_time=began).end(ended)
        span.end(end)

    async def close(self) -> None:
        """Send the remaining spans, for at most a few seconds."""
        await asyncio.to_thread(self._provider.force_flush, int(_LAST_SECONDS * 1000))
        await asyncio.to_thread(self._provider.shutdown)
