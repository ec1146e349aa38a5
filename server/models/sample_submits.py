"""A sample of any route, on its way into the ledger."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from ...engine import messages
from ..dialect import Dialect
from ..errors import ApiError
from ..ledger.samples import KIND, SampleNumber
from ..operations.operation import Operation, Submission

if TYPE_CHECKING:
    from ..backend import Backend


async def submit(
    backend: Backend,
    owner: str,
    sample: messages.Sample,
    number: SampleNumber | None = None,
    reply: dict[str, Any] | None = None,
    dialect: Dialect = "tinker",
) -> Operation:
    """`sample` has no request id yet. Raises ApiError."""
    backend.sampling.check(owner, sample)

    opened: str | None = None

    def message(request_id: str) -> messages.Sample:
        nonlocal opened
        if sample.stream:
            backend.streams.open(request_id, owner)
            opened = request_id
        return msgspec.structs.replace(sample, request_id=request_id)

    try:
        with backend.admission.sample(owner) as accepted:
            operation = await backend.operations.accept(
                Submission(
                    owner,
                    KIND,
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
            backend.streams.close(opened)
        raise
    return operation
