"""Saves: checkpoints of models' training states and weights, from a router to their submit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from sqlalchemy import Connection

from ...ckpt import paths
from ...engine import messages
from ..access import Quotas
from ..checkpoints import expiry, named
from ..dialect import DIALECT_RULES
from ..errors import StorageQuotaExceeded
from ..ledger import checkpoints as checkpoint_rows
from ..operations.operation import Operation
from ..operations.operations import Operations
from .run import Run
from .submits import Submits


def spelled(run: Run, uri: paths.CheckpointUri) -> str:
    """Spell a checkpoint's path as the model's client does."""
    return f"{DIALECT_RULES[run.dialect].scheme}{run.name}/{uri.checkpoint_id}"


def save_answer(kind: str, run: Run, uri: paths.CheckpointUri) -> dict[str, Any]:
    """Make the answer to a save, without its size."""
    return {
        "type": kind,
        "path": spelled(run, uri),
        "name": uri.name,
        "checkpoint_path": spelled(run, uri),
        "tinker_path": str(uri),
        "xorl_path": f"{paths.XORL_SCHEME}{run.name}/{uri.checkpoint_id}",
    }


Reservation = Callable[[Connection, str], messages.Failed | None]
"""A save's own part of the transaction that accepts it."""


class SavedWeights(Protocol):
    """Uses weights that are saved for samplers."""

    def is_awaited(self, base_model: str, owner: str) -> bool:
        """Return whether weights that the owner saves are wanted as soon as they are there."""

    def follow(self, operation: Operation, save: messages.ToEngine | None, base_model: str) -> None:
        """Note that a save was accepted; `save` is its message, None if it was made before."""


class Saves:
    """Saves the weights of models."""

    def __init__(self, submits: Submits, operations: Operations, quotas: Quotas, saved: SavedWeights):
        self._submits = submits
        self._operations = operations
        self._quotas = quotas
        self._saved = saved

    async def state(self, run: Run, name: str, seq_id: int | None = None, **fields: Any) -> Operation:
        """Save the training state under this name; `fields` are those of `checkpoint`. Raises ApiError."""
        uri = named(run.id, "weights", name)
        directory = paths.new_directory(uri.run, uri.segment, uri.name)
        return await self._submits.submit(
            run,
            "save_weights",
            seq_id,
            messages.SaveState(request_id="", model_id=run.id, directory=directory),
            save_answer("save_weights", run, uri),
            self.checkpoint(run, uri, directory, **fields),
        )

    async def named_sampler(
        self, run: Run, seq_id: int | None, directory: str, reply: dict[str, Any], reserve: Reservation
    ) -> Operation:
        """Save weights to sample from as a checkpoint. Raises ApiError."""
        message = messages.SaveSampler("", run.id, directory)
        return await self._sampler(run, "save_weights_for_sampler", seq_id, message, reply, reserve, None)

    async def unnamed_sampler(
        self,
        run: Run,
        seq_id: int | None,
        directory: str,
        reply: dict[str, Any],
        reserve: Reservation,
        key: str | None = None,
    ) -> Operation:
        """Save weights that only a sampling session names. `key` as in `Submits.submit`. Raises ApiError."""
        urgent = self._saved.is_awaited(run.base_model, run.owner)
        message = messages.SaveSampler("", run.id, directory, deferred=True, urgent=urgent)
        return await self._sampler(run, "save_unnamed_sampler", seq_id, message, reply, reserve, key)

    async def _sampler(
        self,
        run: Run,
        kind: str,
        seq_id: int | None,
        message: messages.SaveSampler,
        reply: dict[str, Any],
        reserve: Reservation,
        key: str | None,
    ) -> Operation:
        operation = await self._submits.submit(run, kind, seq_id, message, reply, reserve, key)
        self._saved.follow(operation, await self._operations.message(operation), run.base_model)
        return operation

    def checkpoint(
        self,
        run: Run,
        uri: paths.CheckpointUri,
        directory: str,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        user_metadata: dict[str, str] | None = None,
    ) -> Reservation:
        """Reserve the name in the transaction of the submit; a name that is taken fails the operation.

        Raises StorageQuotaExceeded there, until the tenant deletes checkpoints.
        """
        expires_at = expiry(ttl_seconds)
        limit = self._quotas[run.owner].checkpoint_bytes

        def also(connection: Connection, request_id: str) -> messages.Failed | None:
            # What a name of a model means is one thing, also when the model was unloaded and made again.
            taken = checkpoint_rows.is_taken(connection, uri) or (
                run.alias is not None
                and checkpoint_rows.find_by_alias(connection, run.owner, run.alias, uri) is not None
            )
            if not overwrite and taken:
                message = f"checkpoint {spelled(run, uri)!r} exists; choose another name"
                if uri.segment == "weights":
                    message += " or set overwrite"
                return messages.Failed(request_id, message, "user")
            if (used := checkpoint_rows.stored_bytes(connection, run.owner)) >= limit:
                raise StorageQuotaExceeded(
                    f"the checkpoints of this key's tenant take {used} bytes, its quota is {limit}; "
                    "delete some, or give them a ttl"
                )
            checkpoint_rows.add(
                connection,
                uri,
                owner=run.owner,
                operation_id=request_id,
                directory=directory,
                base_model=run.base_model,
                lora=run.lora,
                optimizer=run.optimizer,
                user_metadata=user_metadata,
                expires_at=expires_at,
            )
            return None

        return also
