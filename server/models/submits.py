"""Operations of models, from a router to the ledger: numbered, admitted, accepted."""

from __future__ import annotations

from typing import Any

import msgspec

from ...engine import messages
from ..errors import ApiError, BadRequest, StorageQuotaExceeded
from ..operations.answers import REPLAYED
from ..operations.operation import Operation, Submission, natural_key
from ..operations.operations import Operations
from .admission import Admission
from .run import Run
from .runs import Runs
from .unused_numbers import RefusedSaves, UnusedNumbers

_TRAINING = REPLAYED - {"save_unnamed_sampler"}


class Submits:
    """Submits the operations of models, and uses up the numbers of those that are refused."""

    def __init__(
        self,
        runs: Runs,
        operations: Operations,
        admission: Admission,
        unused: UnusedNumbers,
        refused_saves: RefusedSaves,
    ):
        self._runs = runs
        self._operations = operations
        self._admission = admission
        self._unused = unused
        self._refused_saves = refused_saves

    async def submit(
        self,
        run: Run,
        kind: str,
        seq_id: int | None,
        message: messages.ToEngine,
        reply: dict[str, Any] | None = None,
        also: Any = None,
        key: str | None = None,
    ) -> Operation:
        """A sequenced operation of a model; without a `seq_id` it comes after all that have arrived.
        `message` has no request id yet. `key`, without a `seq_id`: two of the same are one. Only the server's
        own have one, and are all that trains a model that the server trains."""
        if run.driven and key is None and (seq_id is not None or kind in _TRAINING):
            raise BadRequest(
                f"{kind}: the server trains this model (rlve_config); stop it with stop_rlve first. "
                "Saves that have no seq_id, and samples, are welcome meanwhile"
            )
        number = self._runs.reserve_seq(run) if seq_id is None else run.seq_base + seq_id
        try:
            if not self._runs.is_alive(run):
                self._admission.come_back(run.owner, self._runs.alive(run.owner))
            with self._admission.operation(run.owner, self._runs.is_early(run, number)) as accepted:
                operation = await self._operations.accept(
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
                await self._unused.give_up(run.owner, run.id, number, error.message)
            raise
        if operation.seq_id != number:
            await self._unused.give_up(run.owner, run.id, number, f"{kind} was sent before")
        return operation

    async def refuse(self, owner: str, model: Any, seq_id: Any, error: ApiError) -> None:
        """A submit is wrong for good: its number is used up. One without room may be sent again."""
        if error.final:
            await self._unused.consume(owner, model, seq_id, error.message)
        elif isinstance(error, StorageQuotaExceeded) and isinstance(seq_id, int):
            self._refused_saves.refused(owner, model, seq_id, error.message)
