"""Counts and durations per route, for Prometheus at `/metrics`.

Long polls last as long as the work they wait for, by intention.
"""

from __future__ import annotations

import time

import prometheus_client
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Metrics:
    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        self.request_seconds = prometheus_client.Histogram(
            "tinsmith_request_seconds", "Duration of requests", ["route", "status"], registry=self.registry
        )


class Measured:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_at = time.perf_counter()
        status = 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            seconds = time.perf_counter() - started_at
            self._metrics.request_seconds.labels(route, str(status)).observe(seconds)
