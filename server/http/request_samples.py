"""Samples that live no longer than the HTTP request that waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from ..models.sample_submits import SampleSubmits
from ..operations.operation import Operation


class RequestSamples:
    """The samples of one HTTP request. Leaving the context cancels those that have no answer yet."""

    def __init__(self, submits: SampleSubmits, owner: str):
        self._submits = submits
        self.owner = owner
        self._owned: list[Operation] = []

    async def __aenter__(self) -> RequestSamples:
        return self

    async def __aexit__(self, *_error: object) -> None:
        for operation in self._owned:
            self._submits.cancel(operation)

    async def own(self, submitting: Coroutine[Any, Any, Operation]) -> Operation:
        """Await a submit and own its sample, also when the request ends before the submit does."""
        submitted = asyncio.ensure_future(submitting)
        try:
            operation = await asyncio.shield(submitted)
        except asyncio.CancelledError:
            submitted.add_done_callback(self._cancel_late)
            raise
        self._owned.append(operation)
        return operation

    def disown(self) -> None:
        """Let the samples outlive the request; streams cancel their own (`ServedSamples.drawn`)."""
        self._owned.clear()

    def _cancel_late(self, submitted: asyncio.Task[Operation]) -> None:
        if not submitted.cancelled() and submitted.exception() is None:
            self._submits.cancel(submitted.result())
