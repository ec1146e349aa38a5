"""Numbers of a model's operations that will not be run: used up, so that the operations after them run."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from sqlalchemy import Connection

from ...engine import messages
from ..errors import ApiError
from ..ledger import operations as rows
from ..ledger.ledger import Ledger
from ..operations.dispatcher import Dispatcher
from ..operations.operation import Operation, natural_key


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
