"""A sample of any route, on its way into the ledger."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from ...engine import messages
from ..dialect import Dialect
from ..operations.operation import Operation, Submission

if TYPE_CHECKING:
    from ..backend import Backend


async def submit(
    backend: Backend,
    owner: str,
    sample: messages.Sample,
    natural_key: str | None = None,
    reply: dict[str, Any] | None = None,
    dialect: Dialect = "tinker",
) -> Operation:
    """`sample` has no request id yet. Raises ApiError."""
    backend.sampling.check(owner, sample)

    def message(request_id: str) -> messages.Sample:
        if sample.stream:
            backend.streams.open(request_id)
        return msgspec.structs.replace(sample, request_id=request_id)

    with backend.admission.sample(owner) as accepted:
        operation = await backend.operations.accept(
            Submission(owner, "sample", natural_key, message, reply or {}, dialect=dialect)
        )
        accepted(operation)
    return operation
