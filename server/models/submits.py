"""Operations of models, from a router to the ledger: numbered, admitted, accepted.

Numbers of a model's operations that will not be run: used up, so that the operations after them run.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from sqlalchemy import Connection

from ...engine import messages
from ..errors import ApiError, BadRequest, StorageQuotaExceeded
from ..ledger import operations as rows
from ..ledger.ledger import Ledger
from ..operations.answers import REPLAYED
from ..operations.dispatcher import Dispatcher
from ..operations.operation import Operation, Submission, natural_key
from ..operations.operations import Operations
from .admission import Admission
from .run import Run
from .runs import Runs


class UnusedNumbers:
    """`numbered` says which operation of which model a client means, and raises ApiError for a model that is
    not its own."""

    def __init__(
        self,
        ledger: Ledger,
        dispatcher: Dispatcher[Operation],
        numbered: Callable[[str, str, int], Awaitable[tuple[str, int]]],
    ):
        self._ledger = ledger
        self._dispatcher = dispatcher
        self._numbered = numbered

    async def consume(self, owner: str, model_id: Any, seq_id: Any, message: str) -> None:
        """A submit is refused: its number is used up, so that the operations after it run."""
        is_number = isinstance(seq_id, int) and not isinstance(seq_id, bool)
        if not isinstance(model_id, str) or not is_number or not 0 < seq_id < 1 << 61:
            return
        try:
            model_id, seq_id = await self._numbered(owner, model_id, seq_id)
        except ApiError:
            return
        await self.give_up(owner, model_id, seq_id, message)

    async def give_up(self, owner: str, model_id: str, seq_id: int, message: str) -> None:
        """The number of an operation that will not be run, if it has not had its turn."""
        if seq_id < self._dispatcher.next_seq(model_id):
            return
        request_id = f"req_{uuid.uuid4().hex}"
        failure = messages.Failed(request_id, message, "user")
        operation = Operation(
            request_id, owner, "refused", model_id, seq_id, {}, answer=failure, rejected=True
        )

        def change(connection: Connection) -> bool:
            key = natural_key(model_id, seq_id)
            if rows.find_by_natural_key(connection, key) is not None:
                return False
            rows.add(
                connection,
                id=request_id,
                owner=owner,
                natural_key=key,
                kind=operation.kind,
                model_id=model_id,
                seq_id=seq_id,
                reply={},
                state="rejected",
                answer=messages.encode(failure),
            )
            return True

        if await self._ledger.write(change):
            operation.finished.set()
            self._dispatcher.add(operation)


class RefusedSaves:
    """Saves that were refused for want of room, and that nobody may send again.

    A client sends such a save again for some minutes and then gives it up, and the operations after it would
    wait for its number. A save changes no model, so once it is not sent again its number is used up and they
    run.
    """

    def __init__(self, unused: UnusedNumbers, patience_seconds: float):
        self._unused = unused
        self._patience_seconds = patience_seconds
        self._timers: dict[tuple[str, int], asyncio.TimerHandle] = {}
        self._consuming: set[asyncio.Task[None]] = set()

    def refused(self, owner: str, model_id: str, seq_id: int, message: str) -> None:
        """Now, for the first time or again."""
        known = self._timers.pop((model_id, seq_id), None)
        if known is not None:
            known.cancel()
        self._timers[model_id, seq_id] = asyncio.get_running_loop().call_later(
            self._patience_seconds, self._give_up, owner, model_id, seq_id, message
        )

    def _give_up(self, owner: str, model_id: str, seq_id: int, message: str) -> None:
        del self._timers[model_id, seq_id]
        task = asyncio.ensure_future(self._use_up(owner, model_id, seq_id, message))
        self._consuming.add(task)
        task.add_done_callback(self._consuming.discard)

    async def _use_up(self, owner: str, model_id: str, seq_id: int, message: str) -> None:
        try:
            await self._unused.consume(owner, model_id, seq_id, message)
        except ApiError:  # the ledger cannot be written now
            self.refused(owner, model_id, seq_id, message)

    def close(self) -> None:
        for timer in self._timers.values():
            timer.cancel()


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
