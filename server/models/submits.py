"""Operations of models, from a router to the ledger: numbered, admitted, accepted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from ...engine import messages
from ..errors import ApiError, BadRequest, StorageQuotaExceeded
from ..operations.answers import REPLAYED
from ..operations.operation import Operation, Submission, natural_key
from .run import Run

if TYPE_CHECKING:
    from ..backend import Backend

_TRAINING = REPLAYED - {"save_unnamed_sampler"}


async def submit(
    backend: Backend,
    run: Run,
    kind: str,
    seq_id: int | None,
    message: messages.ToEngine,
    reply: dict[str, Any] | None = None,
    also: Any = None,
    key: str | None = None,
) -> Operation:
    """A sequenced operation of a model; without a `seq_id` it comes after all that have arrived. `message`
    has no request id yet. `key`, without a `seq_id`: two of the same are one. Only the server's own have one,
    and are all that trains a model that the server trains."""
    if run.driven and key is None and (seq_id is not None or kind in _TRAINING):
        raise BadRequest(
            f"{kind}: the server trains this model (rlve_config); stop it with stop_rlve first. Saves that "
            "have no seq_id, and samples, are welcome meanwhile"
        )
    number = backend.runs.reserve_seq(run) if seq_id is None else run.seq_base + seq_id
    try:
        if not backend.runs.is_alive(run):
            backend.admission.come_back(run.owner, backend.runs.alive(run.owner))
        with backend.admission.operation(run.owner, backend.runs.is_early(run, number)) as accepted:
            operation = await backend.operations.accept(
                Submission(
                    run.owner,
                    kind,
                    key if seq_id is None else natural_key(run.id, number),
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
            await backend.runs.unused_numbers.give_up(run.owner, run.id, number, error.message)
        raise
    if operation.seq_id != number:
        await backend.runs.unused_numbers.give_up(run.owner, run.id, number, f"{kind} was sent before")
    return operation


async def refuse(backend: Backend, owner: str, model: Any, seq_id: Any, error: ApiError) -> None:
    """A submit is wrong for good: its number is used up. One without room may be sent again."""
    if error.final:
        await backend.runs.unused_numbers.consume(owner, model, seq_id, error.message)
    elif isinstance(error, StorageQuotaExceeded) and isinstance(seq_id, int):
        backend.refused_saves.refused(owner, model, seq_id, error.message)
