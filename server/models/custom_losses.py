"""Losses that clients upload: checked by the engine, kept in the ledger, sent along with each operation."""

from __future__ import annotations

import asyncio
import contextlib
import re

from sqlalchemy import Connection

from ...engine import messages
from ..access.quotas import Quotas
from ..errors import BadRequest, NotFound
from ..ledger import custom_losses as rows
from ..ledger import session_rows
from ..ledger.ledger import Ledger
from ..operations.operation import Operation, Submission
from ..operations.operations import Operations

MAX_LOSSES, MAX_BYTES = 64, 2 << 20  # of a session
_CHECKED_WITHIN = 5.0  # seconds; a check takes milliseconds, but the engine may be compiling, or starting
_LOSS_ID = re.compile(r"([^/]{1,192}):loss:(0|[1-9][0-9]{0,18})")


class CustomLosses:
    """`enabled`: whether clients may have any. They take up bytes of their session, until it ends."""

    def __init__(self, ledger: Ledger, operations: Operations, quotas: Quotas, enabled: bool):
        self._ledger = ledger
        self._quotas = quotas
        self._operations = operations
        self._enabled = enabled

    async def create(self, owner: str, session_id: str, seq_id: int, loss: messages.CustomLoss) -> Operation:
        """Of a session of the owner's. The same number again is the first one.

        Raises BadRequest, also for a graph that the engine refuses at once; one that it refuses later is told
        of by the operation's answer.
        """
        self._require_enabled()
        limit = self._quotas.of(owner).metadata_bytes

        def within_limits(connection: Connection, _request_id: str) -> None:
            count, size = rows.stored(connection, session_id)
            if count >= MAX_LOSSES or size + len(loss.graph) > MAX_BYTES:
                raise BadRequest(
                    f"create_custom_loss: the session has {count} losses of {size} bytes; "
                    f"it may have {MAX_LOSSES} of {MAX_BYTES} bytes"
                )
            session_rows.require_room(connection, owner, limit)
            session_rows.charge(connection, session_id, session_rows.size_of(loss.graph))

        operation = await self._operations.accept(
            Submission(
                owner,
                rows.KIND,
                rows.natural_key(session_id, seq_id),
                lambda request_id: messages.CheckCustomLoss(request_id, loss),
                {"type": rows.KIND, "loss_id": f"{session_id}:loss:{seq_id}"},
                also=within_limits,
                session_id=session_id,
            )
        )
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(operation.finished.wait(), _CHECKED_WITHIN)
        if isinstance(operation.answer, messages.Failed) and operation.answer.category == "user":
            raise BadRequest(f"create_custom_loss: {operation.answer.message}")
        return operation

    async def find(self, owner: str, session_id: str, loss_id: str) -> messages.CustomLoss:
        """Raises NotFound for one that is not of this session of the owner's."""
        self._require_enabled()
        named = _LOSS_ID.fullmatch(loss_id)
        if named is not None and named[1] == session_id:
            key = rows.natural_key(session_id, int(named[2]))
            row = await self._ledger.read(lambda connection: rows.find(connection, key))
            if row is not None and row.owner == owner:
                message = messages.decode_to_engine(row.data)
                assert isinstance(message, messages.CheckCustomLoss)
                return message.loss
        raise NotFound(
            f"unknown custom loss {loss_id[:256]!r}: create it with create_custom_loss in the model's session"
        )

    def _require_enabled(self) -> None:
        if not self._enabled:
            raise BadRequest("this server runs no custom losses; the SDK runs them in the client")
