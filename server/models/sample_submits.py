"""A sample of any route, on its way into the ledger."""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

from ...engine import messages
from ..dialect import Dialect
from ..errors import ApiError
from ..ledger.operations import SAMPLE, SampleNumber
from ..operations.operation import Operation, Submission
from ..operations.operations import Operations
from ..operations.sample_streams import SampleStreams
from .admission import Admission


class SampleCheck(Protocol):
    """Whoever knows which samples can be drawn."""

    def check(self, owner: str, sample: messages.Sample) -> None:
        """Raise BadRequest, naming the field, for a sample that will never be drawn."""


class SampleSubmits:
    """Submits samples: checked, admitted, accepted."""

    def __init__(
        self, operations: Operations, admission: Admission, streams: SampleStreams, checks: SampleCheck
    ):
        self._operations = operations
        self._admission = admission
        self._streams = streams
        self._checks = checks

    def check(self, owner: str, sample: messages.Sample) -> None:
        """Raise BadRequest for a sample that `submit` would refuse because of what it asks for."""
        self._checks.check(owner, sample)

    async def submit(
        self,
        owner: str,
        sample: messages.Sample,
        number: SampleNumber | None = None,
        reply: dict[str, Any] | None = None,
        dialect: Dialect = "tinker",
    ) -> Operation:
        """Accept a sample, which has no request id yet. Raises ApiError."""
        self._checks.check(owner, sample)
        opened: str | None = None

        def message(request_id: str) -> messages.Sample:
            nonlocal opened
            if sample.stream:
                self._streams.open(request_id, owner)
                opened = request_id
            return msgspec.structs.replace(sample, request_id=request_id)

        try:
            with self._admission.sample(owner) as accepted:
                operation = await self._operations.accept(
                    Submission(
                        owner,
                        SAMPLE,
                        number.natural_key if number else None,
                        message,
                        reply or {},
                        dialect=dialect,
                        session_id=number.session_id if number else None,
                        sampler_id=number.sampler_id if number else None,
                        sample_number=number.number if number else None,
                    )
                )
                accepted(operation)
        except ApiError:
            if opened is not None:
                self._streams.close(opened)
            raise
        return operation

    def cancel(self, operation: Operation) -> None:
        """Stop drawing a sample that nobody waits for any more."""
        self._streams.close(operation.request_id)
        if operation.answer is None and not self._operations.stopped:
            self._operations.cancel(operation)
