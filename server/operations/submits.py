"""Operations of models, from a router to the ledger: numbered, admitted, accepted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from ...engine import messages
from ..errors import ApiError, StorageQuotaExceeded
from ..live.run import Run
from .operation import Operation, Submission, natural_key

if TYPE_CHECKING:
    from ..backend import Backend


async def submit(
    backend: Backend,
    run: Run,
    kind: str,
    seq_id: int | None,
    message: messages.ToEngine,
    reply: dict[str, Any] | None = None,
    also: Any = None,
) -> Operation:
    """A sequenced operation of a model; without a `seq_id` it comes after all that have arrived. `message`
    has no request id yet."""
    number = backend.runs.reserve_seq(run) if seq_id is None else run.seq_base + seq_id
    try:
        if not backend.runs.is_alive(run):
            backend.admission.come_back(run.owner, backend.runs.alive(run.owner))
        with backend.admission.operation(run.owner, backend.runs.is_early(run, number)) as accepted:
            operation = await backend.operations.accept(
                Submission(
                    run.owner,
                    kind,
                    None if seq_id is None else natural_key(run.id, number),
                    lambda request_id: msgspec.structs.replace(message, request_id=request_id),
                    {"model_id": run.name} | (reply or {}),
                    run.id,
                    number,
                    also,
                    run.dialect,
                )
            )
            accepted(operation)
    except ApiError as error:
        if seq_id is None:  # nobody will send this number again
            await backend.operations.give_up(run.owner, run.id, number, error.message)
        raise
    return operation


async def refuse(backend: Backend, owner: str, model: Any, seq_id: Any, error: ApiError) -> None:
    """A submit is wrong for good: its number is used up. One without room may be sent again."""
    if error.final:
        await backend.operations.consume(owner, model, seq_id, error.message)
    elif isinstance(error, StorageQuotaExceeded) and isinstance(seq_id, int):
        backend.refused_saves.refused(owner, model, seq_id, error.message)
